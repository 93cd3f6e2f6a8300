"""Published layouts of data sets, read into rows: COCO, Karpathy's splits, ScienceQA, LLaVA.

Tables are read in ``tables.py``. Only annotations are read here; ``plan.py`` looks at the pictures. What is
wrong with a file is a ``UserError`` that names the file; what is wrong with a row goes to ``BadRows``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.building.left_out import BadRows, Note
from dehvf_ds.data.chat import TURN_FORM
from dehvf_ds.data.damage import BAD_NAME, KEY_TWICE, NO_CAPTION, DamagedSample
from dehvf_ds.data.records import check_record, pictures_named
from dehvf_ds.data.text import decode_text, is_text, parse_json


@dataclass(frozen=True)
class SourceRow:
    """One row before its picture is read: a name for its key, the picture's path or None, the record."""

    name: str
    image: Path | None
    record: dict[str, Any]


def read_coco(annotations: Path, images: Path, *, note: Note, bad: BadRows | None = None) -> list[SourceRow]:
    """Reads COCO's official annotations: pictures in the file's order, their captions in the file's order.

    Args:
        annotations: ``captions_*.json``.
        images: directory of the pictures.
        note: told of empty captions beside others, which are left out.
        bad: takes rows that cannot be used; by default the first is an error.

    Raises:
        UserError: the file is not of this kind, an annotation names an unknown picture, an id stands twice.
    """
    content = _read_object(annotations, ("images", "annotations"), "COCO captions")
    bad = bad or BadRows(skip=False)
    pictures: dict[Any, str] = {}
    captions: dict[Any, list[Any]] = {}
    seen = set()
    with _entries_of(annotations):
        for number, image in enumerate(content["images"]):
            with bad.row(f"images[{number}]", f"{annotations}: images[{number}]"):
                if image["id"] in pictures:
                    raise DamagedSample(f"image id {image['id']} is given to two pictures", KEY_TWICE)
                pictures[image["id"]], captions[image["id"]] = image["file_name"], []
        for number, annotation in enumerate(content["annotations"]):
            with bad.row(f"annotations[{number}]", f"{annotations}: annotations[{number}]"):
                if annotation["image_id"] not in captions:
                    raise DamagedSample(f"annotation {annotation.get('id')} names an unknown image_id")
                same = tuple(annotation.get(name) for name in ("id", "image_id", "caption"))
                if same[0] is not None and same in seen:
                    raise DamagedSample(f"annotation {same[0]} stands twice", KEY_TWICE)
                seen.add(same)
                captions[annotation["image_id"]].append(annotation.get("caption"))
    rows = CaptionRows(images, bad)
    for image_id, name in pictures.items():
        with bad.row(f"image {image_id}", f"{annotations}: image id {image_id}"):
            rows.add(image_id, name, captions[image_id], name)
    return rows.finish(note)


def read_karpathy(
    dataset: Path, images: Path, split: str, *, note: Note, bad: BadRows | None = None
) -> list[SourceRow]:
    """Reads a Karpathy split; pictures lie at IMAGES/filepath/filename or IMAGES/filename.

    Args:
        dataset: ``dataset_*.json``.
        images: directory of the pictures.
        split: a split's name, or several as ``train+restval``.
        note: as for ``read_coco``.
        bad: as for ``read_coco``.

    Raises:
        UserError: the file is not of this kind, or has no such split.
    """
    content = _read_object(dataset, ("images",), "Karpathy's split")
    bad = bad or BadRows(skip=False)
    with _entries_of(dataset):
        entries = list(content["images"])
    names = (entry.get("split") for entry in entries if isinstance(entry, dict))
    counts = Counter(name for name in names if isinstance(name, str))
    wanted = split.split("+")
    if unknown := [name for name in wanted if name not in counts]:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise UserError(f"--split {split}: {dataset} has no split {unknown[0]!r}; it has {found}")
    rows = CaptionRows(images, bad)
    for number, entry in enumerate(entries):
        with bad.row(f"images[{number}]", f"{dataset}: images[{number}]"):
            if entry["split"] not in wanted:
                continue
            name, folder = entry["filename"], entry.get("filepath", "")
            parts = [folder, name] if inside(images, folder, name).is_file() else [name]
            image_id = entry["cocoid"] if "cocoid" in entry else entry["imgid"]
            # With the folder: two of them may have pictures of one name.
            file_name = str(PurePosixPath(folder, name))
            rows.add(image_id, file_name, [sentence["raw"] for sentence in entry["sentences"]], *parts)
    return rows.finish(note)


def read_scienceqa(
    root: Path,
    split: str,
    *,
    captions: Path | None = None,
    allow_missing_images: bool = False,
    note: Note,
    bad: BadRows | None = None,
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
        bad: takes problems that could not be trained on or scored; by default the first is an error.

    Raises:
        UserError: the files are not of this kind, or there is no such split.
    """
    problems_file, splits_file = root / "problems.json", root / "pid_splits.json"
    problems = _read_object(problems_file, (), "ScienceQA")
    splits = _read_object(splits_file, (), "ScienceQA")
    bad = bad or BadRows(skip=False)
    if split not in splits:
        raise UserError(f"--split {split}: not in {splits_file}; it has {', '.join(splits)}")
    texts = None if captions is None else _read_image_captions(captions)
    if not isinstance(splits[split], list):
        raise UserError(f"{splits_file}: {split} is {type(splits[split]).__name__}, not a list of problems")
    rows, missing, bare, pictures = [], 0, 0, 0
    seen: set[str] = set()
    for given in splits[split]:
        pid = str(given) if type(given) is int else given
        with bad.row(f"problem {pid}", f"{problems_file}: problem {pid}"):
            if pid not in problems:
                raise DamagedSample("it is not there, but pid_splits.json names it")
            if pid in seen:
                raise DamagedSample("pid_splits.json names it twice", KEY_TWICE)
            seen.add(pid)
            record = {**problems[pid], "pid": pid}
            image = None
            if names := pictures_named(record):
                pictures += 1
                image = inside(root / "images", record["split"], pid, names[0])
                if allow_missing_images and not image.is_file():
                    image, missing = None, missing + 1
                    record["image_missing"] = True
                if texts is not None and pid in texts:
                    record["image_caption"] = texts[pid]
                elif texts is not None:
                    bare += 1
            checked = check_record(record, has_picture=image is not None)
            bad.notes.update(checked.notes)
            rows.append(SourceRow(f"{int(pid):06d}" if pid.isdecimal() else pid, image, checked.record))
    if missing:
        note(f"{missing} of {pictures} pictures are missing; their problems are text only")
    if bare:
        note(f"{bare} of {pictures} pictures have no caption in {captions}")
    return rows


def read_llava(annotations: Path, images: Path, *, bad: BadRows | None = None) -> list[SourceRow]:
    """Reads conversations as LLaVA and ShareGPT publish them, in the file's order; records stay as they are.

    Args:
        annotations: a ``.json`` list, or a ``.jsonl`` with one on each line, of
            ``{"id": .., "image": NAME or absent, "conversations": [{"from": .., "value": ..}, ..]}``.
        images: directory of the pictures.
        bad: takes rows that cannot be used; by default the first is an error.

    Raises:
        UserError: the file is not of this kind.
    """
    bad = bad or BadRows(skip=False)
    rows = []
    for number, (place, parse) in enumerate(_read_list(annotations), start=1):
        with bad.row(place, f"{annotations}, {place}"):
            record = parse()
            if not isinstance(record, dict):
                raise DamagedSample("is no object")
            given = record.get("id")
            with _named(f"id {given!r}"):
                if "conversations" not in record:
                    held = ", ".join(map(str, list(record)[:8]))
                    raise DamagedSample(
                        f"has no conversations, a list of {TURN_FORM} (its fields are {held})",
                        NO_CAPTION,
                    )
                names = pictures_named(record)
                path = inside(images, names[0]) if names else None
                checked = check_record(record, has_picture=path is not None)
            bad.notes.update(checked.notes)
            rows.append(SourceRow(f"{number:09d}" if given is None else str(given), path, checked.record))
    return rows


class CaptionRows:
    """Gathers pictures and their captions from any annotation file."""

    def __init__(self, images: Path, bad: BadRows):
        """Begins without a row."""
        self._images = images
        self._bad = bad
        self._rows: list[SourceRow] = []
        self._notes: Counter[str] = Counter()
        self._seen: set[Path] = set()

    def add(self, image_id: Any, file_name: str, captions: Sequence[Any], *parts: str) -> None:
        """Adds a picture at IMAGES/PARTS; its captions lose the space around them.

        Raises:
            DamagedSample: it has no caption, or one that is no text, or was added before.
        """
        path = inside(self._images, *parts)
        with _named(file_name):
            if path in self._seen:
                # It would be learnt twice as often, and scored twice.
                raise DamagedSample("the picture stands twice; put its captions together", KEY_TWICE)
            self._seen.add(path)
            if not captions:
                raise DamagedSample("has no caption", NO_CAPTION)
            record = {"image_id": image_id, "file_name": file_name, "captions": list(captions)}
            checked = check_record(record, has_picture=True)
        record["captions"] = [caption.strip() for caption in checked.record["captions"]]
        self._notes.update(checked.notes)
        self._rows.append(SourceRow(Path(file_name).stem, path, record))

    def finish(self, note: Note) -> list[SourceRow]:
        """All rows; ``note`` is told what was put right in them."""
        for what, count in sorted(self._notes.items()):
            note(f"{count} times: {what}")
        return self._rows


def inside(directory: Path, *parts: str) -> Path:
    """A path below ``directory``; what an annotation names must not lead anywhere else.

    Raises:
        DamagedSample: a part is no text, empty at the end, or leads out of it.
    """
    for part in parts:
        if not isinstance(part, str):
            raise DamagedSample(f"the picture's name {part!r} is not a text", BAD_NAME)
        plain = PurePosixPath(part)
        if plain.is_absolute() and "\0" not in part:
            # As it is named, or by where its folders and links lead.
            for way in (os.path.abspath, os.path.realpath):
                if Path(way(part)).is_relative_to(way(directory)):
                    plain = Path(way(part)).relative_to(way(directory))
                    break
        if plain.is_absolute() or ".." in plain.parts or "\0" in part:
            raise DamagedSample(f"the picture's path {part!r} leaves the directory of the pictures", BAD_NAME)
    if not is_text(parts[-1]):
        raise DamagedSample("a picture's name is empty", BAD_NAME)
    return directory.joinpath(*parts)


def _read_image_captions(path: Path) -> dict[str, str]:
    captions = _read_object(path, ("captions",), "captions of ScienceQA")["captions"]
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise UserError(f"{path}: not captions of ScienceQA: needs {{'captions': {{pid: text}}}}")
    return captions


def _read_list(path: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Where each row stands, and what parses it; of a .jsonl the lines that are not blank."""
    text = read_text(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = enumerate(text.split("\n"), start=1)
        return [(f"line {number}", partial(_parse_line, line)) for number, line in lines if line.strip()]
    content = _parse_json(text, path)
    if not isinstance(content, list):
        raise UserError(
            f"{path}: not conversations: needs a list of rows; a file of one row a line is .jsonl"
        )
    return [(f"row {number}", partial(_itself, row)) for number, row in enumerate(content, start=1)]


def _itself(row: Any) -> Any:
    return row


def _parse_line(line: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"not JSON: {error}") from None


def _read_object(path: Path, fields: Sequence[str], kind: str) -> dict[str, Any]:
    content = _parse_json(read_text(path), path)
    if not isinstance(content, dict) or any(field not in content for field in fields):
        raise UserError(f"{path}: not {kind}: needs an object with {' and '.join(fields) or 'problems'}")
    return content


def read_text(path: Path) -> str:
    """An annotation file's text.

    Raises:
        UserError: there is no such file, or it is not UTF-8.
    """
    _require_file(path)
    try:
        return decode_text(path.read_bytes(), command=shlex.quote(str(path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _parse_json(text: str, where: Path | str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        hint = "; a file of one row a line is .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not JSON: {error}{hint}") from None


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts a row's name before what is wrong with it."""
    try:
        yield
    except DamagedSample as error:
        raise DamagedSample(f"{name}: {error}", error.reason) from None


@contextlib.contextmanager
def _entries_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path}: an entry lacks a field or has another type: {reason}") from error
