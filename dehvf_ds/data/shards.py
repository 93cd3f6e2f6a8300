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
"""Endings of members that surely are no picture. A sample with any other one is not text only, for that may
be its picture in a form that is not decoded (HEIC, SVG, video, arrays, bytes)."""

SIDE_BY_SIDE = (
    "a sample's members must stand side by side: write the tar in the order of the names (tar --sort=name)"
)
"""What to do where they do not."""

LFS_POINTER = b"version https://git-lfs"
"""How the text begins that git leaves in the place of a large file that was not fetched."""

FOREIGN_FILES = {
    LFS_POINTER: "a Git LFS pointer: git lfs pull",
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
    b"PK": "packed by zip: unpack it",
    b"<svg": "an SVG drawing: convert it",
    b"<?xml": "XML, such as an SVG drawing: convert it",
    b"<": "a web page: fetch the file again",
    b"%PDF": "a PDF: convert it",
    b"ftyphei": "HEIC, as iPhones write: convert it",
    b"ftypmif1": "HEIC, as iPhones write: convert it",
}
"""What else lies under the name of a shard or a picture, by its first bytes (or those behind a length), and
what to do."""

# Two zero blocks end a tar archive; a byte range from its middle has none.
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
# What other programs leave beside files (macOS, Windows, git, unpacked pax headers), and WebDataset's notes.
_NO_MEMBER = re.compile(
    r"(?:.*/)?(?:\.[^./][^/]*|Thumbs\.db|desktop\.ini|(?:__MACOSX|PaxHeaders?[^/]*)/.*)|__[^/]*__(?:/(?s:.*))?",
    re.IGNORECASE,
)


class DamagedSample(UserError):
    """A sample that cannot be used; ``data.on_bad`` and ``--skip-bad`` say what becomes of it.

    Attributes:
        reason: one of the words above.
    """

    def __init__(self, message: str, reason: str = BAD_RECORD):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One sample to be written.

    Attributes:
        key: unique in the data set, free of dots, slashes and white space.
        members: bytes by member name: ``json`` and at most one of ``IMAGE_MEMBERS``.
    """

    key: str
    members: dict[str, bytes]


class SampleRange(NamedTuple):
    """Where a sample lies in its shard: key, first byte, end; ``problem`` if its name cannot be used."""

    key: str
    begin: int
    end: int
    problem: str | None = None


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())


def told_by_first_bytes(data: bytes, kinds: Mapping[bytes, str]) -> str | None:
    """What a file of another kind than its name says is, by how it begins; None if no kind begins so."""
    return next((told for start, told in kinds.items() if data.startswith(start)), None)


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
    """Name of the picture among a sample's members, as ``parse_members`` gives them."""
    return next((name for name in IMAGE_MEMBERS if name in members), None)


def parse_members(data: bytes, where: str) -> dict[str, Any]:
    """Splits one sample's byte range: ``__key__`` and ``__url__`` (str), and bytes by ending.

    The picture stands under its last ending, one of ``IMAGE_MEMBERS``, and the texts under ``json`` and
    ``txt``, whatever stands before these (``s0.input.jpg``). A ``DamagedSample`` says what cannot be: several
    samples or pictures, a link in the place of a file, no text.
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


def sample_ranges(path: Path, shown: Path) -> Iterator[SampleRange]:
    """Yields every sample of a shard in order; neighbours of one key belong together.

    Archives that were joined by ``cat`` are read to the end: after the mark of one's end the next may begin.
    What is no whole tar is a ``UserError`` that calls it ``shown``.
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
            begin = file.read(tarfile.BLOCKSIZE).lstrip()
        kind = told_by_first_bytes(begin, FOREIGN_FILES)
        remedy = f"it is {kind}" if kind else "copy it again"
        raise UserError(f"{shown}: not a whole, uncompressed tar: {one_line(error)}; {remedy}") from None


def _ranges_of(archive: tarfile.TarFile) -> Iterator[SampleRange]:
    last: SampleRange | None = None
    while info := archive.next():
        # tarfile remembers every member; a shard of millions would fill the memory.
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        # Where the next header begins: ``size`` is another for sparse files and links.
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
    """Where an archive that follows the one which ends at ``end`` begins; None if only zeros follow."""
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


def _by_kind(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members with picture and texts under their last endings alone."""
    kinds: dict[str, list[str]] = {}
    for name in members:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    pictures = [name for kind in IMAGE_MEMBERS for name in kinds.get(kind, ())]
    texts = [name for kind in TEXT_MEMBERS for name in kinds.get(kind, ())]
    split = "a key ends at the first dot of a name, so rename files whose names have more"
    if len(pictures) > 1:
        several = f"holds {len(pictures)} pictures ({_listed(pictures)}); one a sample is read: {split}"
        raise DamagedSample(several, SEVERAL_PICTURES)
    found = dict(members)
    for kind in (*IMAGE_MEMBERS, *TEXT_MEMBERS):
        names = kinds.get(kind, [])
        if kind in members or not names:
            continue
        if len(names) > 1:
            raise DamagedSample(f"holds {len(names)} members .{kind} ({_listed(names)}); keep one")
        found[kind] = found.pop(names[0])
    for picture, text in ((picture, text) for picture in pictures for text in texts):
        parts = [name.rpartition(".")[0] for name in (picture, text)]
        if parts[0] != parts[1] and all(re.search(r"\d", part) for part in parts):
            raise DamagedSample(
                f"holds .{picture} beside .{text}, which are of two samples: {split}", BAD_NAME
            )
    if not texts:
        held = _listed(list(members))
        raise DamagedSample(f"lacks its .json or .txt (it holds {held}); {SIDE_BY_SIDE}", NO_CAPTION)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(f".{name}" for name in names[:3]) + (", .." if len(names) > 3 else "")
