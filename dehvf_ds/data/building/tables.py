"""Pictures and captions of a table: Flickr8k's, Flickr30k's, those of open_clip, and yours."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dehvf_ds.config import UserError
from dehvf_ds.data.building.left_out import BadRows, Note
from dehvf_ds.data.building.sources import CaptionRows, SourceRow, read_text
from dehvf_ds.data.damage import BAD_RECORD

PICTURE_COLUMNS = (
    *("image", "image_name", "image_path", "image_file", "filepath", "file_path", "filename", "file_name"),
    *("file", "path", "img", "img_path", "picture", "photo"),
)
"""Names of the column of pictures, in any case, the first that is there."""

CAPTION_COLUMNS = (
    "caption",
    "captions",
    "comment",
    "title",
    "text",
    "description",
    "sentence",
    "raw",
    "alt_text",
)
"""Names of the column of captions."""

DELIMITERS = (",", "\t", ";", "|")

# What a program quoted in a table with bars: it did so because of a quote inside, which it doubled.
_QUOTED = re.compile(r'\s*"((?:[^"]|"")*""(?:[^"]|"")*)"\s*')
# Excel's line that tells the separator.
_SEPARATOR = re.compile(r"\s*\"?sep=.\"?\s*", re.IGNORECASE)


def read_csv(captions: Path, images: Path, *, note: Note, bad: BadRows | None = None) -> list[SourceRow]:
    """Reads a table with a header that names a column of pictures and one of captions; others are ignored.

    The header tells commas, tabs, semicolons or bars. Rows of one picture are joined; blank lines and Excel's
    ``sep=;`` are skipped.

    Args:
        captions: the file, in UTF-8.
        images: directory of the pictures.
        note: told of empty captions beside others, which are left out.
        bad: takes rows that cannot be used; by default the first is an error.

    Raises:
        UserError: the file or its header is not there, or it is no table.
    """
    bad = bad or BadRows(skip=False)
    texts: dict[str, list[str | None]] = {}
    lines_of: dict[str, int] = {}
    splits: Counter[str] = Counter()
    for line, fields, names, places in _rows(captions):
        if len(fields) != len(names):
            quote = "; quote texts that hold the separator" if len(fields) > len(names) else ""
            where = f"{captions}, line {line}: {len(fields)} fields, not {len(names)}{quote}"
            bad.add(f"line {line}", where, BAD_RECORD)
            continue
        if "split" in names:
            splits[fields[names.index("split")].strip()] += 1
        name, caption = (fields[place].strip() for place in places)
        texts.setdefault(name, []).append(caption)
        lines_of.setdefault(name, line)
    if len(splits) > 1:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(splits.items()))
        note(f"{captions}: has a column split ({found}), which is not looked at: all rows are taken")
    rows = CaptionRows(images, bad)
    for name, found in texts.items():
        with bad.row(f"line {lines_of[name]} ({name})", f"{captions}, line {lines_of[name]}"):
            rows.add(Path(name).stem, name, found, name)
    return rows.finish(note)


def _rows(path: Path) -> Iterator[tuple[int, list[str], list[str], tuple[int, int]]]:
    """Yields line, fields, the columns' names, and the places of picture and caption."""
    # Line ends of any program; a field may hold them, too.
    file = io.StringIO(read_text(path), newline="")
    header, before = "", 0
    while (not header.strip() or _SEPARATOR.fullmatch(header)) and (header := file.readline()):
        before += 1
    delimiter, names, places = _read_header(path, header.strip("\r\n"))
    # strict: without it a quote that is never closed swallows the rest of the file as one caption. Tables
    # with bars are written with quotes (pandas) and without (Flickr30k).
    bars = delimiter == "|" and not header.lstrip().startswith('"')
    quoting = csv.QUOTE_NONE if bars else csv.QUOTE_MINIMAL
    lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True)
    try:
        for fields in lines:
            while len(fields) > len(names) and not fields[-1].strip():
                fields.pop()
            if bars:
                fields = [_unquoted(field) for field in fields]
            if any(field.strip() for field in fields):
                yield before + lines.line_num, fields, names, places
    except csv.Error as error:
        raise UserError(
            f"{path}, line {before + lines.line_num}: not csv: {error}; look at its quotes"
        ) from None


def _read_header(path: Path, header: str) -> tuple[str, list[str], tuple[int, int]]:
    for delimiter in DELIMITERS:
        names = [_plain(name) for name in header.split(delimiter)]
        found = [
            next((names.index(name) for name in known if name in names), None)
            for known in (PICTURE_COLUMNS, CAPTION_COLUMNS)
        ]
        if found[0] is not None and found[1] is not None:
            own = (names[place] for place in found if place is not None)
            if twice := next((name for name in own if names.count(name) > 1), None):
                raise UserError(
                    f"{path}: its header names {twice} twice; write a row for each caption of a picture"
                )
            return delimiter, names, (found[0], found[1])
    raise UserError(
        f"{path}: its first line is {header[:120]!r}, not a header with a column of pictures (image, "
        "image_name, filepath, file_name, ..) and one of captions (caption, comment, title, text, ..), "
        "as image,caption"
    )


def _unquoted(field: str) -> str:
    found = _QUOTED.fullmatch(field)
    return found[1].replace('""', '"') if found else field


def _plain(name: str) -> str:
    return name.strip().strip("\"'").strip().lower().replace(" ", "_").replace("-", "_")
