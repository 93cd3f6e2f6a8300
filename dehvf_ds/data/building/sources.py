"""Published layouts of data sets, read into rows: COCO, Karpathy's splits, a csv file, ScienceQA, LLaVA.

Only annotations are read here; ``building.py`` looks at the pictures. What is wrong with a file is a
``UserError`` that names the file and the entry. ``note`` gets what was left out, in one line.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dehvf_ds.config import UserError

Note = Callable[[str], None]
"""Takes one line that the user should read."""


@dataclass(frozen=True)
class SourceRow:
    """One row before its picture is read: a name for its key, the picture's path or None, the record."""

    name: str
    image: Path | None
    record: dict[str, Any]


def read_coco(annotations: Path, images: Path, *, note: Note) -> list[SourceRow]:
    """Reads COCO's official annotations: pictures in the file's order, their captions in the file's order.

    Args:
        annotations: ``captions_*.json``.
        images: directory of the pictures.
        note: told of empty captions and pictures without one, which are left out.

    Raises:
        UserError: the file is not of this kind, an annotation names an unknown picture, an id stands twice.
    """
    content = _read_object(annotations, ("images", "annotations"), "COCO captions")
    with _entries_of(annotations):
        captions: dict[Any, list[str]] = {}
        for image in content["images"]:
            if image["id"] in captions:
                raise UserError(f"{annotations}: image id {image['id']} is given to two pictures")
            captions[image["id"]] = []
        for annotation in content["annotations"]:
            if annotation["image_id"] not in captions:
                raise UserError(f"{annotations}: annotation {annotation.get('id')} names an unknown image_id")
            captions[annotation["image_id"]].append(annotation["caption"])
        pictures = (
            (image["id"], image["file_name"], _inside(images, annotations, image["file_name"]))
            for image in content["images"]
        )
        return _caption_rows(annotations, ((*p, captions[p[0]]) for p in pictures), note)


def read_karpathy(dataset: Path, images: Path, split: str, *, note: Note) -> list[SourceRow]:
    """Reads a Karpathy split; pictures lie at IMAGES/filepath/filename or IMAGES/filename.

    Args:
        dataset: ``dataset_*.json``.
        images: directory of the pictures.
        split: a split's name, or several as ``train+restval``.
        note: as for ``read_coco``.

    Raises:
        UserError: the file is not of this kind, or has no such split.
    """
    content = _read_object(dataset, ("images",), "Karpathy's split")
    with _entries_of(dataset):
        counts = Counter(image["split"] for image in content["images"])
        wanted = split.split("+")
        if unknown := [name for name in wanted if name not in counts]:
            found = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            raise UserError(f"--split {split}: {dataset} has no split {unknown[0]!r}; it has {found}")

        def path_of(image: dict[str, Any]) -> Path:
            nested = _inside(images, dataset, image.get("filepath", ""), image["filename"])
            return nested if nested.is_file() else _inside(images, dataset, image["filename"])

        pictures = (
            (
                image["cocoid"] if "cocoid" in image else image["imgid"],
                # With the folder: two of them may have pictures of one name.
                str(PurePosixPath(image.get("filepath", ""), image["filename"])),
                path_of(image),
                [sentence["raw"] for sentence in image["sentences"]],
            )
            for image in content["images"]
            if image["split"] in wanted
        )
        return _caption_rows(dataset, pictures, note)


def read_csv(captions: Path, images: Path, *, note: Note) -> list[SourceRow]:
    """Reads a csv file with the header ``image,caption``; rows of one picture are joined.

    Args:
        captions: the file, in UTF-8.
        images: directory of the pictures.
        note: as for ``read_coco``.

    Raises:
        UserError: the file or its header is not there, or a line is not of two fields.
    """
    texts: dict[str, list[str]] = {}
    _require_file(captions)
    with captions.open(encoding="utf-8-sig", newline="") as file:
        # strict: without it a quote that is never closed swallows the rest of the file as one caption.
        lines = csv.reader(file, strict=True)
        try:
            if next(lines, None) != ["image", "caption"]:
                raise UserError(f"{captions}: its first line is not the header image,caption")
            for fields in lines:
                if len(fields) != 2:
                    raise UserError(
                        f"{captions}, line {lines.line_num}: {len(fields)} fields, not 2; quote commas"
                    )
                texts.setdefault(fields[0], []).append(fields[1])
        except UnicodeDecodeError as error:
            raise UserError(f"{captions}: not UTF-8 after line {lines.line_num}: {error}") from None
        except csv.Error as error:
            raise UserError(f"{captions}, line {lines.line_num}: not csv: {error}") from None
    pictures = ((Path(name).stem, name, _inside(images, captions, name), raw) for name, raw in texts.items())
    return _caption_rows(captions, pictures, note)


def read_scienceqa(
    root: Path, split: str, *, captions: Path | None = None, allow_missing_images: bool = False, note: Note
) -> list[SourceRow]:
    """Reads a ScienceQA split. A record is the problem's own fields and its ``pid``.

    Args:
        root: holds ``problems.json``, ``pid_splits.json`` and the pictures as ``images/SPLIT/PID/NAME``,
            SPLIT being the problem's own field.
        split: a split of ``pid_splits.json``.
        captions: the official ``captions.json``; its captions become ``image_caption`` of the problems that
            have a picture.
        allow_missing_images: a problem whose picture is not there becomes text only, with
            ``image_missing``: true.
        note: told how many pictures and captions are missing.

    Raises:
        UserError: the files are not of this kind, or there is no such split.
    """
    problems_file, splits_file = root / "problems.json", root / "pid_splits.json"
    problems = _read_object(problems_file, (), "ScienceQA")
    splits = _read_object(splits_file, (), "ScienceQA")
    if split not in splits:
        raise UserError(f"--split {split}: not in {splits_file}; it has {', '.join(splits)}")
    texts = None if captions is None else _read_image_captions(captions)
    rows, missing, bare, pictures = [], 0, 0, 0
    with _entries_of(problems_file):
        for pid in splits[split]:
            if pid not in problems:
                raise UserError(f"{problems_file}: has no problem {pid}, which pid_splits.json names")
            record = {**problems[pid], "pid": pid}
            image = None
            if record.get("image"):
                pictures += 1
                image = _inside(root / "images", problems_file, record["split"], pid, record["image"])
                if allow_missing_images and not image.is_file():
                    image, missing = None, missing + 1
                    record["image_missing"] = True
                if texts is not None and pid in texts:
                    record["image_caption"] = texts[pid]
                elif texts is not None:
                    bare += 1
            rows.append(SourceRow(f"{int(pid):06d}" if pid.isdecimal() else pid, image, record))
    if missing:
        note(f"{missing} of {pictures} pictures are missing; their problems are text only")
    if bare:
        note(f"{bare} of {pictures} pictures have no caption in {captions}")
    return rows


def read_llava(annotations: Path, images: Path) -> list[SourceRow]:
    """Reads conversations as LLaVA and ShareGPT publish them, in the file's order; records stay as they are.

    Args:
        annotations: a ``.json`` list, or a ``.jsonl`` with one on each line, of
            ``{"id": .., "image": NAME or absent, "conversations": [{"from": .., "value": ..}, ..]}``.
        images: directory of the pictures.

    Raises:
        UserError: the file is not of this kind, a row has no turns, or several pictures.
    """
    rows = []
    for number, record in enumerate(_read_list(annotations), start=1):
        if not isinstance(record, dict):
            raise UserError(f"{annotations}: row {number} is no object")
        where = f"{annotations}: row {number}, id {record.get('id')!r}"
        _check_turns(record.get("conversations"), where)
        image = record.get("image")
        if isinstance(image, list) and len(image) > 1:
            raise UserError(f"{where}: {len(image)} pictures; one picture a row is supported")
        if isinstance(image, list):
            image = image[0] if image else None
        path = _inside(images, where, image) if image else None
        given = record.get("id")
        rows.append(SourceRow(f"{number:09d}" if given is None else str(given), path, record))
    return rows


def _caption_rows(
    source: Path, pictures: Iterable[tuple[Any, str, Path, Sequence[str]]], note: Note
) -> list[SourceRow]:
    rows, bare, blank = [], 0, 0
    for image_id, file_name, path, raw in pictures:
        if wrong := [text for text in raw if not isinstance(text, str)]:
            raise UserError(f"{source}: a caption of {file_name} is {type(wrong[0]).__name__}, not a text")
        captions = [caption.strip() for caption in raw if caption.strip()]
        blank += len(raw) - len(captions)
        if captions:
            record = {"image_id": image_id, "file_name": file_name, "captions": captions}
            rows.append(SourceRow(Path(file_name).stem, path, record))
        else:
            bare += 1
    if bare or blank:
        note(f"left out {blank} empty captions and {bare} pictures without a caption")
    return rows


def _check_turns(turns: Any, where: str) -> None:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: has no turns (conversations is empty or missing)")
    for turn in turns:
        parts = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else ()
        if not parts or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: a turn is not {{'from': TEXT, 'value': TEXT}}")


def _inside(directory: Path, source: Path | str, *parts: str) -> Path:
    """A path below ``directory``; what an annotation names must not lead anywhere else."""
    for part in parts:
        if not isinstance(part, str):
            raise UserError(f"{source}: the picture's name {part!r} is not a text")
        plain = PurePosixPath(part)
        if plain.is_absolute() or ".." in plain.parts or "\0" in part:
            raise UserError(f"{source}: the picture's path {part!r} leaves the directory of the pictures")
    if not parts[-1]:
        raise UserError(f"{source}: a picture's name is empty")
    return directory.joinpath(*parts)


def _read_image_captions(path: Path) -> dict[str, str]:
    captions = _read_object(path, ("captions",), "captions of ScienceQA")["captions"]
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise UserError(f"{path}: not captions of ScienceQA: needs {{'captions': {{pid: text}}}}")
    return captions


def _read_list(path: Path) -> list[Any]:
    if path.suffix.lower() == ".jsonl":
        lines = _read_text(path).split("\n")
        return [
            _parse_json(line, f"{path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    content = _parse_json(_read_text(path), path)
    if not isinstance(content, list):
        raise UserError(f"{path}: not conversations: needs a list of rows")
    return content


def _read_object(path: Path, fields: Sequence[str], kind: str) -> dict[str, Any]:
    content = _parse_json(_read_text(path), path)
    if not isinstance(content, dict) or any(field not in content for field in fields):
        raise UserError(f"{path}: not {kind}: needs an object with {' and '.join(fields) or 'problems'}")
    return content


def _read_text(path: Path) -> str:
    _require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def _parse_json(text: str, where: Path | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


@contextlib.contextmanager
def _entries_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: an entry lacks a field or has another type: {reason}") from error
