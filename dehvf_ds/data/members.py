"""What stands in a tar: which members make a sample, and what each of them is.

A member ``KEY.ENDINGS`` belongs to the sample KEY, as WebDataset splits names: at the first dot after the
last slash. Its last ending says what it is, so that ``s0.input.jpg`` is the picture of ``s0``.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import (
    BAD_NAME,
    LFS_POINTER,
    NO_CAPTION,
    NO_PICTURE,
    SEVERAL_PICTURES,
    DamagedSample,
    one_line,
    told_by_first_bytes,
)

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

END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
"""Two zero blocks end a tar archive; a byte range from its middle has none."""

SIDE_BY_SIDE = (
    "a sample's members must stand side by side: write the tar in the order of the names (tar --sort=name)"
)
"""What to do where they do not."""

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
# What other programs leave beside files: macOS, Windows, git, unpacked pax headers.
_LEFT_BEHIND = re.compile(
    r"(?:.*/)?(?:\.[^./][^/]*|Thumbs\.db|desktop\.ini|(?:__MACOSX|PaxHeaders?[^/]*)/.*)", re.I
)
# What else lies under a shard's name, by its first bytes, and what to do.
_NO_TARS = {
    b"\x1f\x8b": "packed by gzip: unpack it",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zXZ": "packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
    b"PK": "packed by zip: unpack it",
    LFS_POINTER: "a Git LFS pointer: git lfs pull",
    b"<": "a web page: fetch the shard again",
}
_DIGIT = re.compile(r"\d")
# WebDataset's own notes on a shard.
_META = re.compile(r"__[^/]*__(?:$|/)")


class SampleRange(NamedTuple):
    """Where a sample lies in its shard: key, first byte, end; ``problem`` if its name cannot be used."""

    key: str
    begin: int
    end: int
    problem: str | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and its endings in lower case; None for what belongs to no sample.

    Raises:
        DamagedSample: the name is not KEY.ENDING inside the archive, in UTF-8.
    """
    name = name.removeprefix("./")
    if _LEFT_BEHIND.fullmatch(name) or _META.match(name):
        return None
    found = _NAME.fullmatch(name)
    if found is None or name.startswith("/") or ".." in found[1].split("/"):
        raise DamagedSample(f"member {name!r}: not KEY.EXTENSION inside the archive", BAD_NAME)
    if _UNPRINTABLE.search(name):
        raise DamagedSample(
            f"member {name.encode(errors='backslashreplace').decode()!r}: its name is not UTF-8, or has "
            "control characters; rename it",
            BAD_NAME,
        )
    return found[1], found[2].lower()


def picture_name(members: dict[str, Any]) -> str | None:
    """Name of the picture among a sample's members, as ``parse_members`` gives them."""
    return next((name for name in IMAGE_MEMBERS if name in members), None)


def parse_members(data: bytes, where: str) -> dict[str, Any]:
    """Splits one sample's byte range: ``__key__`` and ``__url__`` (str), and bytes by ending.

    The picture stands under its last ending, one of ``IMAGE_MEMBERS``, and the texts under ``json`` and
    ``txt``, whatever stands before these (``s0.input.jpg``).

    Raises:
        DamagedSample: the bytes are no tar members, hold several samples or several pictures, a link where a
            file should be, or lack the text.
    """
    members: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data + END_OF_ARCHIVE), mode="r:") as archive:
            for info in archive:
                if info.isdir() or (parts := split_name(info.name)) is None:
                    continue
                keys.add(parts[0])
                if not info.isreg():
                    raise DamagedSample(_link_problem(info, parts[1]), NO_PICTURE)
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

    Raises:
        UserError: the file is no whole tar.
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
        kind = told_by_first_bytes(begin, _NO_TARS)
        remedy = f"it is {kind}" if kind else "copy it again"
        raise UserError(f"{shown}: not a whole, uncompressed tar: {one_line(error)}; {remedy}") from None


def _ranges_of(archive: tarfile.TarFile) -> Iterator[SampleRange]:
    last: SampleRange | None = None
    while info := archive.next():
        # tarfile remembers every member; a shard of millions would fill the memory.
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if info.isdir():
            continue
        # Where the next header begins: ``size`` is another for sparse files and links.
        end = archive.offset
        try:
            parts = split_name(info.name)
        except DamagedSample as error:
            if last is not None:
                yield last
            yield SampleRange("", info.offset, end, str(error))
            last = None
            continue
        if parts is None:
            continue
        if last is not None and parts[0] == last.key:
            last = last._replace(end=end)
            continue
        if last is not None:
            yield last
        last = SampleRange(parts[0], info.offset, end)
    if last is not None:
        yield last


def _next_archive(file: io.BufferedReader, end: int) -> int | None:
    """Where an archive that follows the one which ends at ``end`` begins; None if only zeros follow.

    Raises:
        EOFError: the mark of the end is missing; without it an archive cut between two members looks whole.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end is missing")
    place = end + tarfile.BLOCKSIZE
    while chunk := file.read(1 << 20):
        if filled := len(chunk) - len(chunk.lstrip(b"\0")):
            place += filled
        if filled < len(chunk):
            return place - place % tarfile.BLOCKSIZE
    return None


def _by_kind(members: dict[str, bytes]) -> dict[str, bytes]:
    kinds: dict[str, list[str]] = {}
    for name in members:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    pictures = [name for kind in IMAGE_MEMBERS for name in kinds.get(kind, ())]
    if len(pictures) > 1:
        raise DamagedSample(
            f"holds {len(pictures)} pictures ({_listed(pictures)}); one a sample is read: a key ends at the "
            "first dot of a name, so rename files whose names have more",
            SEVERAL_PICTURES,
        )
    found = dict(members)
    for kind in (*(name.rpartition(".")[2] for name in pictures), *TEXT_MEMBERS):
        names = kinds.get(kind, [])
        if kind not in members and len(names) == 1:
            found[kind] = found.pop(names[0])
        elif kind not in members and names:
            raise DamagedSample(f"holds {len(names)} members .{kind} ({_listed(names)}); keep one")
    texts = [name for name in members if name.rpartition(".")[2] in TEXT_MEMBERS]
    for picture, text in ((picture, text) for picture in pictures for text in texts):
        parts = [name.rpartition(".")[0] for name in (picture, text)]
        if parts[0] != parts[1] and all(map(_DIGIT.search, parts)):
            raise DamagedSample(
                f"holds .{picture} beside .{text}, which are of two samples: a key ends at the first dot of "
                "a name, so rename files whose names have more",
                BAD_NAME,
            )
    if not any(kind in found for kind in TEXT_MEMBERS):
        raise DamagedSample(
            f"lacks its .json or .txt (it holds {_listed(list(members))}); {SIDE_BY_SIDE}", NO_CAPTION
        )
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(f".{name}" for name in names[:3]) + (", .." if len(names) > 3 else "")


def _link_problem(info: tarfile.TarInfo, endings: str) -> str:
    kind = "link to " + repr(info.linkname) if info.islnk() or info.issym() else "device or pipe"
    return f"its .{endings} is a {kind}, not a file; write the tar with --dereference --hard-dereference"
