"""Reference captions read from the files that COCO and Karpathy's splits are published as."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError


@dataclass(frozen=True)
class _Picture:
    id: Any
    file_name: str
    captions: list[str] = field(default_factory=list)


def load_references(path: Path, split: str | None = None) -> dict[str, list[str]]:
    """Reads the human captions of each picture, in the file's order and as they were written.

    Args:
        path: COCO's ``captions_*.json``, or Karpathy's ``dataset_*.json``.
        split: a split of Karpathy's, or several as ``train+restval``; None for COCO's, which has none.

    Returns:
        Captions by the picture's file name without its suffix, ``COCO_val2014_000000000042``: the key that
        ``tools/build_shards.py`` gives its row. Karpathy's val and test are both parts of ``val2014``.

    Raises:
        UserError: the file is of neither kind or has no such split; an id or a file name stands twice; a
            caption is of no picture; a picture has no caption, or only blank ones.
    """
    content = _read_object(path)
    try:
        if "annotations" in content:
            if split is not None:
                raise UserError(f"{path}: COCO's captions have no splits; split {split!r} cannot be taken")
            pictures = _official(path, content)
        else:
            pictures = _karpathy(path, content, split)
        keys = [Path(picture.file_name).stem for picture in pictures]
        bare = [picture.file_name for picture in pictures if not "".join(picture.captions).strip()]
        _refuse_repeated(path, "image ids", (picture.id for picture in pictures))
        _refuse_repeated(path, "file names", keys)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: an entry lacks a field or has another type: {reason}") from error
    if bare:
        raise UserError(f"{path}: {len(bare)} pictures have no caption, {bare[0]} the first")
    return dict(zip(keys, (picture.captions for picture in pictures), strict=True))


def is_karpathy(path: Path) -> bool:
    """Whether the file holds splits, as Karpathy's does.

    Raises:
        UserError: the file is not there, or of neither kind.
    """
    return "annotations" not in _read_object(path)


def _official(path: Path, content: dict[str, Any]) -> list[_Picture]:
    pictures = [_Picture(image["id"], image["file_name"]) for image in content["images"]]
    by_id = {picture.id: picture for picture in pictures}
    annotations = content["annotations"]
    _refuse_repeated(path, "annotation ids", (item["id"] for item in annotations))
    strays = [item["id"] for item in annotations if item["image_id"] not in by_id]
    if strays:
        raise UserError(f"{path}: {len(strays)} annotations are of no picture, id {strays[0]} the first")
    for item in annotations:
        by_id[item["image_id"]].captions.append(item["caption"])
    return pictures


def _karpathy(path: Path, content: dict[str, Any], split: str | None) -> list[_Picture]:
    images = content["images"]
    counts = Counter(image["split"] for image in images)
    wanted = [] if split is None else split.split("+")
    if not wanted or any(name not in counts for name in wanted):
        found = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise UserError(f"{path}: split {split!r} is none of {found}")
    return [
        _Picture(
            image["cocoid"] if "cocoid" in image else image["imgid"],
            image["filename"],
            [sentence["raw"] for sentence in image["sentences"]],
        )
        for image in images
        if image["split"] in wanted
    ]


def _refuse_repeated(path: Path, what: str, values: Iterable[Any]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: {len(repeated)} {what} stand more than once, {repeated[0]} the first")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: neither COCO's captions nor Karpathy's splits: has no list of images")
    return content
