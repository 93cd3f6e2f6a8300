"""Published annotation files, read into rows: COCO, Karpathy's splits, tables, ScienceQA, LLaVA.

Builder and evaluation read them here. Only annotations are read; the writer looks at the pictures. A mistake
in a file as a whole is a ``UserError`` that names the file; one in a row goes to ``BadRows``.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dehvf_ds.atomic import sha256_of
from dehvf_ds.config import UserError
from dehvf_ds.data.building.scan import BadRows, note
from dehvf_ds.data.prompts import TURN_FORM
from dehvf_ds.data.records import check_record, pictures_named
from dehvf_ds.data.shards import BAD_NAME, BAD_RECORD, KEY_TWICE, NO_CAPTION, DamagedSample
from dehvf_ds.data.text import decode_text, parse_json

# Names of a table's columns of pictures and captions, in any case; the first that is there counts.
PICTURE_COLUMNS = (
    *("image", "image_name", "image_path", "image_file", "filepath", "file_path", "filename", "file_name"),
    *("file", "path", "img", "img_path", "picture", "photo"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "comment", "title", "text", "description", "sentence", "raw", "alt_text"),
)

# A field that pandas quoted in a table of bars: it holds a quote, doubled.
_QUOTED = re.compile(r'\s*"((?:[^"]|"")*""(?:[^"]|"")*)"\s*')
# Excel's line that names the separator.
_SEPARATOR = re.compile(r"\s*\"?sep=.\"?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class SourceRow:
    """One row before its picture is read: a name for its key, the picture's path or None, the record."""

    name: str
    image: Path | None
    record: dict[str, Any]


def read_coco(annotations: Path, images: Path, *, bad: BadRows) -> list[SourceRow]:
    """Reads COCO's official ``captions_*.json``: pictures and their captions in the file's order."""
    content = _read_object(annotations, "COCO captions", "images", "annotations")
    pictures: dict[Any, tuple[str, list[Any]]] = {}
    seen = set()
    for number, image in enumerate(content["images"]):
        with bad.row(f"images[{number}]", f"{annotations}: images[{number}]"):
            if image["id"] in pictures:
                raise DamagedSample(f"image id {image['id']} belongs to two pictures", KEY_TWICE)
            pictures[image["id"]] = image["file_name"], []
    for number, annotation in enumerate(content["annotations"]):
        with bad.row(f"annotations[{number}]", f"{annotations}: annotations[{number}]"):
            if annotation["image_id"] not in pictures:
                raise DamagedSample(f"annotation {annotation.get('id')} names an unknown image_id")
            same = tuple(annotation.get(name) for name in ("id", "image_id", "caption"))
            if same[0] is not None and same in seen:
                raise DamagedSample(f"annotation {same[0]} occurs twice", KEY_TWICE)
            seen.add(same)
            pictures[annotation["image_id"]][1].append(annotation.get("caption"))
    rows = _CaptionRows(images, bad)
    for image_id, (name, captions) in pictures.items():
        with bad.row(f"image {image_id}", f"{annotations}: image id {image_id}, {name}"):
            rows.add(image_id, name, captions, name)
    return rows.rows


def read_karpathy(dataset: Path, images: Path, split: str, *, bad: BadRows) -> list[SourceRow]:
    """Reads a split of Karpathy's ``dataset_*.json``, or several as ``train+restval``.

    Pictures lie at IMAGES/filepath/filename or IMAGES/filename.
    """
    entries = _read_object(dataset, "Karpathy's split", "images")["images"]
    names = (entry.get("split") for entry in entries if isinstance(entry, dict))
    counts = Counter(name for name in names if isinstance(name, str))
    wanted = split.split("+")
    if unknown := [name for name in wanted if name not in counts]:
        raise UserError(f"--split {split}: {dataset} has no split {unknown[0]!r}; it has {_listed(counts)}")
    rows = _CaptionRows(images, bad)
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
    return rows.rows


def read_csv(captions: Path, images: Path, *, bad: BadRows) -> list[SourceRow]:
    """Reads a table with a header that names a column of pictures and one of captions; others are ignored.

    The header shows whether commas, tabs, semicolons or bars separate. Rows of one picture are joined; blank
    lines and Excel's ``sep=;`` are skipped.
    """
    pictures: dict[str, tuple[int, list[str]]] = {}
    splits: Counter[str] = Counter()
    for line, fields, picture, caption in _table_rows(captions):
        if fields.pop(None, None) or None in fields.values():
            where = f"{captions}, line {line}: not as many fields as the header's {len(fields)}"
            bad.add(f"line {line}", f"{where}; quote texts that hold the separator", BAD_RECORD)
            continue
        splits[fields.get("split", "").strip()] += 1
        pictures.setdefault(fields[picture].strip(), (line, []))[1].append(fields[caption].strip())
    if len(splits) > 1:
        note(f"{captions}: has a column split ({_listed(splits)}), which is not used: all rows are taken")
    rows = _CaptionRows(images, bad)
    for name, (line, texts) in pictures.items():
        with bad.row(f"line {line} ({name})", f"{captions}, line {line}"):
            rows.add(Path(name).stem, name, texts, name)
    return rows.rows


def read_scienceqa(
    root: Path, split: str, captions: Path | None = None, allow_missing_images: bool = False, *, bad: BadRows
) -> list[SourceRow]:
    """Reads a split of ScienceQA. A record is the problem's own fields and its ``pid``.

    ``root`` holds ``problems.json``, ``pid_splits.json`` and the pictures as ``images/SPLIT/PID/NAME``, SPLIT
    being the problem's own field. ``captions`` is the official ``captions.json``, for the ``image_caption``
    of problems with a picture. A missing picture that is allowed gives ``image_missing``: true.
    """
    file = root / "problems.json"
    problems = _read_object(file, "ScienceQA")
    pids = _read_object(root / "pid_splits.json", f"splits of ScienceQA with --split {split}", split)[split]
    texts = {} if captions is None else _read_object(captions, "captions of ScienceQA").get("captions")
    if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise UserError(f"{captions}: not captions of ScienceQA: needs {{'captions': {{pid: text}}}}")
    rows: dict[str, SourceRow | None] = {}
    for number in pids:
        pid = str(number) if type(number) is int else number
        with bad.row(f"problem {pid}", f"{file}: problem {pid}"):
            if pid not in problems:
                raise DamagedSample("it is not there, but pid_splits.json names it")
            if pid in rows:
                raise DamagedSample("pid_splits.json names it twice", KEY_TWICE)
            rows[pid] = None
            record, image = {**problems[pid], "pid": pid}, None
            if names := pictures_named(record):
                image = inside(root / "images", record["split"], pid, names[0])
                if allow_missing_images and not image.is_file():
                    image, record["image_missing"] = None, True
                    bad.notes["problem whose picture is missing, text only"] += 1
                if pid in texts:
                    record["image_caption"] = texts[pid]
                elif captions:
                    bad.notes[f"problem whose picture has no caption in {captions.name}"] += 1
            checked = check_record(record, has_picture=image is not None)
            bad.notes.update(checked.notes)
            rows[pid] = SourceRow(f"{int(pid):06d}" if pid.isdecimal() else pid, image, checked.record)
    return [row for row in rows.values() if row is not None]


def read_llava(annotations: Path, images: Path, *, bad: BadRows) -> list[SourceRow]:
    """Reads conversations as LLaVA and ShareGPT publish them, in the file's order.

    They are a ``.json`` list, or a ``.jsonl`` with one on each line, of
    ``{"id": .., "image": NAME or absent, "conversations": [{"from": .., "value": ..}, ..]}``.
    """
    in_lines = annotations.suffix.lower() in (".jsonl", ".ndjson")
    entries: Any = _read_text(annotations).split("\n") if in_lines else _read_json(annotations)
    if not isinstance(entries, list):
        raise UserError(f"{annotations}: needs a list of rows; a file of one row a line is .jsonl")
    rows, count = [], 0
    for number, entry in enumerate(entries, start=1):
        if in_lines and not entry.strip():
            continue
        place, count = f"{'line' if in_lines else 'row'} {number}", count + 1
        with bad.row(place, f"{annotations}, {place}"):
            record = parse_json(entry) if in_lines else entry
            row_id = record.get("id")
            if "conversations" not in record:
                held = f"(its fields are {', '.join(list(record)[:8])})"
                raise DamagedSample(f"has no conversations, a list of {TURN_FORM} {held}", NO_CAPTION)
            names = pictures_named(record)
            path = inside(images, names[0]) if names else None
            checked = check_record(record, has_picture=path is not None)
            bad.notes.update(checked.notes)
            rows.append(SourceRow(f"{count:09d}" if row_id is None else str(row_id), path, checked.record))
    return rows


class Layout(NamedTuple):
    """A published layout: its reader, what it is, and the flags that the reader takes, in this order."""

    read: Callable[..., list[SourceRow]]
    about: str
    flags: tuple[str, ...]
    optional: tuple[str, ...] = ()


LAYOUTS = {
    "coco": Layout(read_coco, "official COCO captions_*.json", ("annotations", "images")),
    "karpathy": Layout(read_karpathy, "Karpathy's dataset_*.json", ("dataset", "images", "split")),
    "csv": Layout(read_csv, "a table with a header, as image,caption", ("captions", "images")),
    "scienceqa": Layout(
        read_scienceqa,
        "ScienceQA's problems.json and pictures",
        ("root", "split", "captions", "allow_missing_images"),
        optional=("captions", "allow_missing_images"),
    ),
    "llava": Layout(read_llava, "conversations of LLaVA or ShareGPT", ("json", "images")),
}


def read_layout(
    name: str, values: Mapping[str, Any], *, bad: BadRows
) -> tuple[list[SourceRow], dict[str, Any]]:
    """Reads a layout with the values of its flags; returns its rows, and what a manifest says of them."""
    layout = LAYOUTS[name]
    rows = layout.read(*(values[flag] for flag in layout.flags), bad=bad)
    files = {flag: values[flag] for flag in layout.flags if isinstance(values[flag], Path)}
    if root := files.get("root"):
        files |= {part: root / f"{part}.json" for part in ("problems", "pid_splits")}
    settings = {
        flag: value
        for flag in layout.flags
        if (value := values[flag]) is not None and not isinstance(value, Path)
    }
    described = {flag: describe_file(path) for flag, path in files.items() if path.is_file()}
    return rows, {"source": name, **settings, **described}


def inside(directory: Path, *parts: str) -> Path:
    """A path below ``directory``; a ``DamagedSample`` where an annotation's names lead anywhere else."""
    path = directory.joinpath(*parts)
    # As it is named, or where its folders and links lead.
    within = (Path(way(path)).is_relative_to(way(directory)) for way in (os.path.abspath, os.path.realpath))
    if ".." in PurePosixPath(*parts).parts or not any(within):
        shown = str(PurePosixPath(*parts))
        raise DamagedSample(f"the picture's path {shown!r} leaves the directory of the pictures", BAD_NAME)
    return path


def describe_file(path: Path) -> dict[str, str]:
    """A file's name and hash: what a manifest says of it, the same on every machine."""
    return {"name": path.name, "sha256": sha256_of(path)}


class _CaptionRows:
    """Gathers pictures and their captions from any annotation file."""

    def __init__(self, images: Path, bad: BadRows):
        self.rows: list[SourceRow] = []
        self._images = images
        self._notes = bad.notes
        self._seen: set[Path] = set()

    def add(self, image_id: Any, file_name: str, captions: Sequence[Any], *parts: str) -> None:
        """Adds a picture at IMAGES/PARTS; its captions lose the space around them."""
        path = inside(self._images, *parts)
        if path in self._seen:
            # It would be learnt twice as often, and scored twice.
            raise DamagedSample(f"{file_name}: the picture occurs twice; join its captions", KEY_TWICE)
        self._seen.add(path)
        if not captions:
            raise DamagedSample(f"{file_name}: has no caption", NO_CAPTION)
        record = {"image_id": image_id, "file_name": file_name, "captions": list(captions)}
        checked = check_record(record, has_picture=True)
        record["captions"] = [caption.strip() for caption in checked.record["captions"]]
        self._notes.update(checked.notes)
        self.rows.append(SourceRow(Path(file_name).stem, path, record))


def _table_rows(path: Path) -> Iterator[tuple[int, dict[Any, Any], str, str]]:
    """Yields the number of a line, its fields by column, and which columns hold picture and caption.

    As ``csv.DictReader`` has it: fields that a line lacks are None, those beyond the header a list at None.
    """
    # Line ends of any program; a field may hold them, too.
    file = io.StringIO(_read_text(path), newline="")
    header, before = "", 0
    while (not header.strip() or _SEPARATOR.fullmatch(header)) and (header := file.readline()):
        before += 1
    delimiter, names, picture, caption = _read_header(path, header.strip("\r\n"))
    # Tables with bars are written with quotes (pandas) and without (Flickr30k). strict: without it a quote
    # that is never closed swallows the rest of the file as one caption.
    bare = delimiter == "|" and not header.lstrip().startswith('"')
    quoting = csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL
    reader = csv.DictReader(
        file, names, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True
    )
    try:
        for fields in reader:
            if not "".join(fields.get(None, ())).strip():
                # Separators at a line's end.
                fields.pop(None, None)
            if bare and (quoted := _QUOTED.fullmatch(fields[caption] or "")):
                fields[caption] = quoted[1].replace('""', '"')
            if None in fields or any(field and field.strip() for field in fields.values()):
                yield before + reader.line_num, fields, picture, caption
    except csv.Error as error:
        where = f"{path}, line {before + reader.reader.line_num}"
        raise UserError(f"{where}: not csv: {error}; look at its quotes") from None


def _read_header(path: Path, line: str) -> tuple[str, list[str], str, str]:
    """The separator, the columns' names, and those of picture and caption."""
    for delimiter in (",", "\t", ";", "|"):
        names = [re.sub("[ -]", "_", name.strip("\"' \t").lower()) for name in line.split(delimiter)]
        own = [next((n for n in known if n in names), "") for known in (PICTURE_COLUMNS, CAPTION_COLUMNS)]
        if all(own):
            if twice := [name for name in own if names.count(name) > 1]:
                raise UserError(f"{path}: its header names {twice[0]} twice; write a row for each caption")
            return delimiter, names, own[0], own[1]
    raise UserError(
        f"{path}: its first line is {line[:120]!r}, not a header with a column of pictures (image, filepath, "
        "..) and one of captions (caption, comment, title, text, ..), as image,caption"
    )


def _read_object(path: Path, kind: str, *lists: str) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        held = f"it holds {', '.join(list(content)[:8])}" if isinstance(content, dict) else "it is none"
        needed = f"with lists {' and '.join(lists)} " if lists else ""
        raise UserError(f"{path}: not {kind}: needs an object {needed}({held})")
    return content


def _read_json(path: Path) -> Any:
    try:
        return parse_json(_read_text(path))
    except (ValueError, RecursionError) as error:
        hint = "; a file of one row a line is .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path}: not JSON: {error}{hint}") from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return decode_text(path.read_bytes(), command=shlex.quote(str(path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
