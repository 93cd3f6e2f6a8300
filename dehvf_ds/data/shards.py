"""A shard is a tar: which members make a sample, what each of them is, and why a sample cannot be used.

A member ``KEY.ENDINGS`` belongs to the sample KEY, as WebDataset splits names: at the first dot after the
last slash. Its last ending says what it is, so that ``s0.input.jpg`` is the picture of ``s0``.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dehvf_ds.config import UserError

# Why samples cannot be used, in the words that consoles and manifests count them by.
NO_PICTURE = "without a picture"
SEVERAL_PICTURES = "with several pictures"
UNDECODABLE = "undecodable"
NO_CAPTION = "without a caption"
BAD_TEXT = "of damaged text"
BAD_RECORD = "with an unreadable record"
BAD_PROBLEM = "with an unusable problem"
BAD_CHAT = "with an unusable conversation"
BAD_NAME = "with an unusable name"
KEY_TWICE = "of a key used before"

IMAGE_MEMBERS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"),
    *("jp2", "j2k", "jpf", "jpx", "j2c", "jpc", "ppm", "pgm", "pbm", "pnm"),
)
"""Endings of pictures that ``images.py`` decodes."""

TEXT_MEMBERS = ("json", "txt")

NO_PICTURES = (
    *TEXT_MEMBERS,
    *("cls", "cls2", "label", "labels", "id", "key", "index", "idx", "url", "source", "lang", "license"),
    *("md5", "sha1", "sha256", "hash", "score", "scores", "meta", "metadata", "caption", "text", "log"),
    *("jsonl", "yaml", "yml", "toml", "ini", "csv", "tsv", "xml", "html", "htm", "md"),
)
"""Endings of members that are certainly no picture; any other may be one in a form that is not decoded (HEIC,
SVG, video, arrays, bytes), so its sample is not text-only."""

SIDE_BY_SIDE = "a sample's members must lie side by side: write the tar sorted by name (tar --sort=name)"

BINARY_FILES = {
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull",
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
    b"PK\x03\x04": "a zip archive (unpack it) or a spreadsheet (save it as text)",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls): save it as csv in UTF-8",
    b"PAR1": "a parquet table: save it as text",
}
_FOREIGN_FILES = BINARY_FILES | {
    b"<svg": "an SVG drawing: convert it",
    b"<?xml": "XML, such as an SVG drawing: convert it",
    b"<": "a web page: fetch the file again",
    b"%PDF": "a PDF: convert it",
    b"ftyphei": "HEIC, as iPhones write: convert it",
    b"ftypmif1": "HEIC, as iPhones write: convert it",
}

# Two zero blocks end a tar archive; a byte range from its middle has none.
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
# What other programs leave beside files (macOS, Windows, git, unpacked pax headers), and WebDataset's notes.
_NO_MEMBER = re.compile(
    r"(?:.*/)?(?:\.[^./][^/]*|Thumbs\.db|desktop\.ini|(?:__MACOSX|PaxHeaders?[^/]*)/.*)|__[^/]*__(?:/(?s:.*))?",
    re.IGNORECASE,
)
_SPLIT = "a key ends at the first dot of a name, so rename files whose names have more"


class DamagedSample(UserError):
    """A sample that cannot be used, for one of the reasons above; see ``data.on_bad`` and ``--skip-bad``."""

    def __init__(self, message: str, reason: str = BAD_RECORD):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One sample to be written; the key is free of dots, slashes and white space."""

    key: str
    members: dict[str, bytes]
    """bytes by member name: ``json`` and at most one of ``IMAGE_MEMBERS``"""


class SampleRange(NamedTuple):
    """Where a sample is in its shard: key, first byte, end; ``problem`` if its name cannot be used."""

    key: str
    begin: int
    end: int
    problem: str | None = None


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())


def foreign_kind(data: bytes, kinds: Mapping[bytes, str] = _FOREIGN_FILES) -> str | None:
    """What a file that is no picture, tar or text is, by its first bytes, and what to do; None if unknown."""
    return next((kind for start, kind in kinds.items() if data.startswith(start)), None)


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and its endings in lower case; None for what belongs to no sample."""
    name = name.removeprefix("./")
    if _NO_MEMBER.fullmatch(name):
        return None
    found = _NAME.fullmatch(name)
    if found is None or name.startswith("/") or ".." in found[1].split("/"):
        raise DamagedSample(f"member {name!r}: not KEY.EXTENSION inside the archive", BAD_NAME)
    if _UNPRINTABLE.search(name):
        printable = name.encode(errors="backslashreplace").decode()
        raise DamagedSample(
            f"member {printable!r}: its name is not UTF-8, or has control characters; rename it", BAD_NAME
        )
    return found[1], found[2].lower()


def picture_name(members: Mapping[str, Any]) -> str | None:
    """Name of the picture among a sample's members, as ``parse_members`` returns them."""
    return next((name for name in IMAGE_MEMBERS if name in members), None)


def parse_members(data: bytes, where: str) -> dict[str, Any]:
    """Splits one sample's byte range: ``__key__`` and ``__url__`` (str), and bytes by last ending.

    Several samples or pictures, a link in place of a file, or no text at all are a ``DamagedSample``.
    """
    members: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data + _END_OF_ARCHIVE), mode="r:") as archive:
            for info in archive:
                if info.isdir() or (parts := split_name(info.name)) is None:
                    continue
                keys.add(parts[0])
                if not info.isreg():
                    kind = f"link to {info.linkname!r}" if info.islnk() or info.issym() else "device or pipe"
                    remedy = "write the tar with --dereference --hard-dereference"
                    raise DamagedSample(f"its .{parts[1]} is a {kind}, not a file; {remedy}", NO_PICTURE)
                if parts[1] in members:
                    raise DamagedSample(f"holds two members .{parts[1]}; keep one")
                file = archive.extractfile(info)
                members[parts[1]] = file.read() if file else b""
        if len(keys) != 1:
            raise DamagedSample("not one sample")
        found = _by_kind(members)
    except DamagedSample as error:
        raise DamagedSample(f"{where}: {error}", error.reason) from None
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise DamagedSample(f"{where}: not readable: {one_line(error)}") from error
    return {"__key__": keys.pop(), "__url__": where, **found}


def _by_kind(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members, with picture and texts under their last endings."""
    kinds = {name: name.rpartition(".")[2] for name in members}
    pictures = [name for name, kind in kinds.items() if kind in IMAGE_MEMBERS]
    texts = [name for name, kind in kinds.items() if kind in TEXT_MEMBERS]
    if len(pictures) > 1:
        several = f"holds {len(pictures)} pictures ({_listed(pictures)}); only one is read: {_SPLIT}"
        raise DamagedSample(several, SEVERAL_PICTURES)
    found = dict(members)
    for name in (*pictures, *texts):
        if (kind := kinds[name]) in members:
            continue
        if len(same := [text for text in texts if kinds[text] == kind]) > 1:
            raise DamagedSample(f"holds {len(same)} members .{kind} ({_listed(same)}); keep one")
        found[kind] = found.pop(name)
    for picture, text in product(pictures, texts):
        parts = [name.rpartition(".")[0] for name in (picture, text)]
        if parts[0] != parts[1] and all(re.search(r"\d", part) for part in parts):
            raise DamagedSample(
                f"holds .{picture} beside .{text}, which are of two samples: {_SPLIT}", BAD_NAME
            )
    if not texts:
        held = _listed(list(members))
        raise DamagedSample(f"lacks its .json or .txt (it holds {held}); {SIDE_BY_SIDE}", NO_CAPTION)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(f".{name}" for name in names[:3]) + (", .." if len(names) > 3 else "")


def sample_ranges(path: Path, shown: Path) -> Iterator[SampleRange]:
    """Yields every sample of a shard in order; neighbours of one key belong together.

    Archives joined by ``cat`` are read to the end: another may follow one's end mark. Anything but a whole
    tar is a ``UserError``, which calls it ``shown``.
    """
    try:
        with path.open("rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    yield from _ranges_of(archive)
                    end = archive.offset
                start = _next_archive(file, end)
    except (tarfile.TarError, EOFError, OverflowError) as error:
        with path.open("rb") as file:
            kind = foreign_kind(file.read(tarfile.BLOCKSIZE).lstrip())
        remedy = f"it is {kind}" if kind else "copy it again"
        raise UserError(f"{shown}: not a whole, uncompressed tar: {one_line(error)}; {remedy}") from None


def _ranges_of(archive: tarfile.TarFile) -> Iterator[SampleRange]:
    last: SampleRange | None = None
    while info := archive.next():
        # tarfile remembers every member; a shard of millions would fill the memory.
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        # Where the next header begins: ``size`` differs for sparse files and links.
        key, end, problem = "", archive.offset, None
        try:
            if info.isdir() or (parts := split_name(info.name)) is None:
                continue
            key = parts[0]
        except DamagedSample as error:
            problem = str(error)
        if last is not None and problem is None and key == last.key:
            last = last._replace(end=end)
            continue
        if last is not None:
            yield last
        last = SampleRange(key, info.offset, end, problem)
    if last is not None:
        yield last


def _next_archive(file: io.BufferedReader, end: int) -> int | None:
    """Where the archive that follows the one ending at ``end`` begins; None if only zeros follow."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        # An archive that was cut between two members would look whole.
        raise EOFError("its end is missing")
    place = end + tarfile.BLOCKSIZE
    while chunk := file.read(1 << 20):
        rest = chunk.lstrip(b"\0")
        place += len(chunk) - len(rest)
        if rest:
            return place - place % tarfile.BLOCKSIZE
    return None
