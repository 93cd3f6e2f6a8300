"""Reference captions read from the files that COCO and Karpathy's splits are published as."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.text import decode_text, is_caption, parse_json

# What follows the last dot of another name belongs to it: "3.5 mm".
_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"}


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
        Captions by the picture's file name as the file has it, with its folder: ``val2014/x.jpg``. A picture
        without a caption is left out, as the builder of shards does.

    Raises:
        UserError: the file is of neither kind or has no such split; an id or a file name stands twice; a
            caption is of no picture.
    """
    content = _read_object(path)
    try:
        if "annotations" in content:
            if split is not None:
                raise UserError(f"{path}: COCO's captions have no splits; split {split!r} cannot be taken")
            pictures = _official(path, content)
        else:
            pictures = _karpathy(path, content, split)
        found = {}
        for picture in pictures:
            if wrong := [caption for caption in picture.captions if not isinstance(caption, str)]:
                raise UserError(f"{path}: a caption of {picture.file_name} is {wrong[0]!r:.40}, not a text")
            # What the builder of shards leaves out, too.
            if kept := [caption for caption in picture.captions if is_caption(caption)]:
                found[picture.file_name] = kept
        _refuse_repeated(path, "image ids", (picture.id for picture in pictures))
        _refuse_repeated(path, "file names", (picture.file_name for picture in pictures))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: an entry lacks a field or has another type: {reason}") from error
    if not found:
        raise UserError(f"{path}: no picture has a caption")
    return found


def match_references(
    references: Mapping[str, Sequence[str]], file_names: Mapping[str, str]
) -> dict[str, list[str]]:
    """Finds each row's captions by its picture's file name.

    Two names are of one picture where their folders agree as far as both have them (``x.jpg`` and
    ``val2014/x.jpg``, but not ``train2014/x.jpg``) and their last parts are the same: first as they are
    written, then in one Unicode form, in any case of the ending, and last with any ending.

    Args:
        references: captions by file name, as ``load_references`` reads them.
        file_names: of the rows' pictures, by the rows' keys.

    Returns:
        The captions by the rows' keys.

    Raises:
        UserError: a row's picture is not among them, or there are several that it could be.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in references:
        by_stem[_forms(name)[-1]].append(name)
    matched: dict[str, str] = {}
    lacking: list[str] = []
    for key, name in file_names.items():
        nearest = _nearest(name, by_stem[_forms(name)[-1]])
        if len(nearest) > 1:
            raise UserError(f"{name}: the references have several such pictures: {', '.join(nearest[:3])}")
        if nearest:
            matched[key] = nearest[0]
        else:
            lacking.append(name)
    if lacking:
        raise UserError(
            f"the references lack {len(lacking)} of {len(file_names)} evaluated pictures, {lacking[0]} the "
            "first; are they of another split?"
        )
    taken: dict[str, str] = {}
    for key, reference in matched.items():
        if reference in taken:
            first, second = file_names[taken[reference]], file_names[key]
            raise UserError(f"{first} and {second} of the rows are both {reference} of the references")
        taken[reference] = key
    return {key: list(references[name]) for key, name in matched.items()}


def _nearest(name: str, candidates: Sequence[str]) -> list[str]:
    """Those of the candidates that agree with the name in the strictest way in which any does."""
    if name in candidates:
        return [name]
    folder, forms = _folder(name), _forms(name)
    near = [other for other in candidates if _agree(folder, _folder(other))]
    for place, form in enumerate(forms):
        if found := [other for other in near if _forms(other)[place] == form]:
            return [other for other in found if _folder(other) == folder] or found
    return []


def _forms(name: str) -> tuple[str, ...]:
    """The last part of a path, each form looser than the one before."""
    last = PurePosixPath(name).name
    plain = unicodedata.normalize("NFC", last)
    stem, dot, ending = plain.rpartition(".")
    if not stem or ending.lower() not in _ENDINGS:
        stem, dot, ending = plain, "", ""
    return last, plain, stem + dot + ending.lower(), stem


def _folder(name: str) -> tuple[str, ...]:
    return PurePosixPath(unicodedata.normalize("NFC", name)).parts[:-1]


def _agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return shared == 0 or one[-shared:] == other[-shared:]


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
    _refuse_repeated(path, "annotation ids", (item["id"] for item in annotations if "id" in item))
    strays = [item["image_id"] for item in annotations if item["image_id"] not in by_id]
    if strays:
        raise UserError(
            f"{path}: {len(strays)} annotations are of no picture, image_id {strays[0]} the first"
        )
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
            str(PurePosixPath(image.get("filepath", ""), image["filename"])),
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
        content = parse_json(decode_text(path.read_bytes(), command=str(path)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: neither COCO's captions nor Karpathy's splits: has no list of images")
    return content
