"""One shard: a tar file of samples, how it is written, and what a scan finds out about each sample.

A sample is a run of neighbouring members: the picture (``members.IMAGE_MEMBERS``; absent for a text-only row)
and ``KEY.json``, the record; shards made by img2dataset may bring the caption as ``KEY.txt``. A scan gives
every sample one byte range and its CRC-32, so that a sample can be read at random and no changed byte goes
unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from webdataset.writer import TarWriter

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import BAD_NAME, KEY_TWICE, UNDECODABLE, DamagedSample
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.members import SIDE_BY_SIDE, parse_members, picture_name, sample_ranges
from dehvf_ds.data.records import CheckedRecord, read_record, text_lengths

_PLAIN_KEY = re.compile(r"[^./\s][^.\s]*")


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One sample as the builders write it.

    Attributes:
        key: unique in the data set, free of dots, slashes and white space.
        members: bytes by member name: ``json`` and at most one of ``members.IMAGE_MEMBERS``.
    """

    key: str
    members: dict[str, bytes]


class BadSample(NamedTuple):
    """A sample that was left out: a word to count it by, and the line that names it."""

    reason: str
    line: str


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """What a scan found in one shard.

    Attributes:
        rows: for each sample the offset and size of its members in bytes, its number of captions (0 for a row
            of another task) and the CRC-32 of its bytes.
        text_lengths: characters of each example's text, row by row: a caption each, or the row's whole text.
        key_hashes: 64 bits of a hash of each sample's key, to find keys that two shards share.
        num_bytes: size of the file.
        sha256: hash of the file.
        num_pictures: samples with a picture.
        tasks: samples by what they are for: ``caption``, ``chat``, ``scienceqa``.
        notes: what was put right in records, by a word each.
        bad: the samples that were left out; only with ``skip_bad``.
    """

    rows: Int64[np.ndarray, "samples 4"]
    text_lengths: Int32[np.ndarray, " examples"]
    key_hashes: UInt64[np.ndarray, " samples"]
    num_bytes: int
    sha256: str
    num_pictures: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: tuple[BadSample, ...] = ()


def write_shard(rows: Iterable[ShardRow], path: Path) -> ShardTable:
    """Writes one shard and scans it; the same rows give the same bytes.

    The file gets its name when it is whole and on the disk: a shard of that name is a finished one.

    Raises:
        UserError: a key or a record is not fit.
    """
    with temporary_name(path).open("wb") as file:
        # Fixed owner, mode and time: the bytes depend on the samples alone.
        writer = TarWriter(
            file, user="dehvf", group="dehvf", mode=0o644, mtime=0, encoder=False, compress=False
        )
        with writer:
            for row in rows:
                if not _PLAIN_KEY.fullmatch(row.key) or "/" in row.key:
                    raise UserError(
                        f"key {row.key!r}: empty, or has a dot, slash or space, where WebDataset splits names"
                    )
                writer.write({"__key__": row.key, **row.members})
    table = scan_shard(temporary_name(path), shown_as=path)
    publish(path)
    return table


def scan_shard(
    path: Path, *, skip_bad: bool = False, decode: bool = False, shown_as: Path | None = None
) -> ShardTable:
    """Reads a whole shard once, in order, and checks every sample (``records.check_record``).

    Args:
        path: the tar file, uncompressed.
        skip_bad: leave unusable samples out of the table instead of raising.
        decode: decode the pictures, too.
        shown_as: the name that messages say; ``path`` by default.

    Raises:
        UserError: the file is no whole tar, or a sample is unusable: no record, no caption, a caption without
            a picture, damaged text, its key stands twice, its path leaves the archive.
    """
    shown = shown_as or path
    good: dict[str, _Found] = {}
    bad: list[BadSample] = []
    seen: set[str] = set()

    def leave_out(error: DamagedSample) -> None:
        if not skip_bad:
            remedy = "repair it, or leave such samples out with --skip-bad"
            raise UserError(f"{error}; {remedy}") from None
        bad.append(BadSample(error.reason, str(error)))

    with path.open("rb") as file:
        for key, begin, end, problem in sample_ranges(path, shown):
            file.seek(begin)
            data = file.read(end - begin)
            twice = DamagedSample(f"{shown}: key {key!r} is given to two samples; {SIDE_BY_SIDE}", KEY_TWICE)
            if key in good and not good[key].has_picture:
                # The rest of it, or another's: its picture may be what follows.
                leave_out(twice)
                del good[key]
            try:
                if problem is not None:
                    raise DamagedSample(f"{shown}: {problem}", BAD_NAME)
                if key in good:
                    raise twice
                checked, has_picture = check_sample(data, f"{shown}: sample {key}", decode=decode)
                if key in seen and not has_picture:
                    raise twice
            except DamagedSample as error:
                leave_out(error)
            else:
                captions, texts = text_lengths(checked.record)
                row = (begin, end - begin, captions, zlib.crc32(data))
                good[key] = _Found(row, texts, has_picture, checked.task, checked.notes)
            seen.add(key)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardTable(
        rows=np.array([found.row for found in good.values()], dtype=np.int64).reshape(-1, 4),
        text_lengths=np.array([n for found in good.values() for n in found.texts], dtype=np.int32),
        key_hashes=hash_keys(good),
        num_bytes=path.stat().st_size,
        sha256=sha256,
        num_pictures=sum(found.has_picture for found in good.values()),
        tasks=Counter(found.task for found in good.values()),
        notes=Counter(note for found in good.values() for note in found.notes),
        bad=tuple(bad),
    )


class _Found(NamedTuple):
    """A usable sample of a shard."""

    row: tuple[int, int, int, int]
    texts: tuple[int, ...]
    has_picture: bool
    task: str
    notes: tuple[str, ...]


def check_sample(data: bytes, where: str, *, decode: bool) -> tuple[CheckedRecord, bool]:
    """Checks a sample's byte range; returns its record, and whether it has a picture.

    Raises:
        DamagedSample: it cannot be used.
    """
    members = parse_members(data, where)
    checked = read_record(members)
    picture = picture_name(members)
    if picture is not None and decode:
        check_picture(members[picture], where)
    return checked, picture is not None


def check_picture(data: bytes, where: str) -> None:
    """Decodes a picture, as small as its kind can be, to see whether it is whole.

    Raises:
        DamagedSample: it is not.
    """
    try:
        decode_image(data, shorter_side=1)
    except ValueError as error:
        raise DamagedSample(f"{where}: {error}", UNDECODABLE) from None


def hash_keys(keys: Iterable[str]) -> UInt64[np.ndarray, " keys"]:
    """64 bits of a hash of each key."""
    digests = b"".join(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys
    )
    return np.frombuffer(digests, dtype="<u8")


def find_key(path: Path, key_hash: int) -> str:
    """The key of a shard that has this hash."""
    return next(r.key for r in sample_ranges(path, path) if int(hash_keys([r.key])[0]) == key_hash)


def temporary_name(path: Path) -> Path:
    """The name that a file has while it is written."""
    return path.with_name(f".{path.name}.part")


def publish(path: Path) -> None:
    """Gives a finished file its name, once its bytes are on the disk."""
    descriptor = os.open(temporary_name(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary_name(path).rename(path)
