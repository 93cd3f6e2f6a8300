"""One shard: a tar file of samples, how it is written, and what a scan finds out about each sample.

A sample is a run of neighbouring members ``KEY.jpg|jpeg|png|webp`` (absent for a text-only row) and
``KEY.json``, the record; shards made by img2dataset may bring the caption as ``KEY.txt``. A scan gives
every sample one byte range and its CRC-32, so that a sample can be read at random and no changed byte goes
unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from dehvf_ds.config import UserError

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
"""Member names that hold a sample's picture."""

TEXT_MEMBERS = ("json", "txt")
# Two zero blocks end a tar archive; a byte range from its middle has none.
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_PLAIN_KEY = re.compile(r"[^./\s][^.\s]*")


class DamagedSample(UserError):
    """A sample that cannot be used; ``data.on_bad`` says what becomes of it."""


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One sample as the builders write it.

    Attributes:
        key: unique in the data set, free of dots, slashes and white space.
        members: bytes by member name: ``json`` and at most one of ``IMAGE_MEMBERS``.
    """

    key: str
    members: dict[str, bytes]


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
        bad: why samples were left out, one line each; only with ``skip_bad``.
    """

    rows: Int64[np.ndarray, "samples 4"]
    text_lengths: Int32[np.ndarray, " examples"]
    key_hashes: UInt64[np.ndarray, " samples"]
    num_bytes: int
    sha256: str
    bad: tuple[str, ...] = ()


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


def scan_shard(path: Path, *, skip_bad: bool = False, shown_as: Path | None = None) -> ShardTable:
    """Reads a whole shard once, in order, and looks at every sample's text (pictures are not decoded).

    Args:
        path: the tar file, uncompressed.
        skip_bad: leave unusable samples out of the table instead of raising.
        shown_as: the name that messages say; ``path`` by default.

    Raises:
        UserError: the file is no whole tar, or a sample is unusable: no record, no caption, no UTF-8, its key
            stands twice, its path leaves the archive.
    """
    shown = shown_as or path
    rows, lengths, bad = [], [], []
    keys: dict[str, None] = {}
    with path.open("rb") as file:
        for key, begin, end in _sample_ranges(path, shown):
            file.seek(begin)
            data = file.read(end - begin)
            try:
                if key in keys:
                    raise DamagedSample(f"{shown}: key {key!r} is given to two samples")
                captions, texts = text_lengths(parse_record(parse_members(data, f"{shown}: sample {key}")))
            except DamagedSample as error:
                if not skip_bad:
                    raise UserError(f"{error}; repair it") from None
                bad.append(str(error))
                continue
            keys[key] = None
            rows.append((begin, end - begin, captions, zlib.crc32(data)))
            lengths.extend(texts)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardTable(
        rows=np.array(rows, dtype=np.int64).reshape(-1, 4),
        text_lengths=np.array(lengths, dtype=np.int32),
        key_hashes=hash_keys(keys),
        num_bytes=path.stat().st_size,
        sha256=sha256,
        bad=tuple(bad),
    )


def hash_keys(keys: Iterable[str]) -> UInt64[np.ndarray, " keys"]:
    """64 bits of a hash of each key."""
    digests = b"".join(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys
    )
    return np.frombuffer(digests, dtype="<u8")


def find_key(path: Path, key_hash: int) -> str:
    """The key of a shard that has this hash."""
    return next(key for key, _, _ in _sample_ranges(path, path) if int(hash_keys([key])[0]) == key_hash)


def parse_members(data: bytes, where: str) -> dict[str, Any]:
    """Splits one sample's byte range: ``__key__`` (a str) and bytes by member name.

    Raises:
        DamagedSample: the bytes are no tar members, hold several samples, or lack the text.
    """
    # webdataset annotates an open archive where it takes a stream.
    stream: Any = io.BytesIO(data + END_OF_ARCHIVE)
    try:
        members = ({**member, "__url__": where} for member in tar_file_iterator(stream))
        samples = list(group_by_keys(members))
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise DamagedSample(f"{where}: not readable: {one_line(error)}") from error
    if len(samples) != 1 or not any(name in samples[0] for name in TEXT_MEMBERS):
        raise DamagedSample(f"{where}: lacks its .json, or is not one sample")
    return samples[0]


def parse_record(members: dict[str, Any]) -> dict[str, Any]:
    """The sample's record; a caption that lies in a ``.txt``, or alone in ``caption``, becomes ``captions``.

    Raises:
        DamagedSample: it is no JSON object in UTF-8, or a caption or turn is no text.
    """
    where = f"{members.get('__url__', 'sample')}"
    try:
        record = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if "txt" in members and "captions" not in record:
            record["captions"] = [members["txt"].decode("utf-8")]
        elif isinstance(record.get("caption"), str) and "captions" not in record:
            record["captions"] = [record["caption"]]
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"{where}: its text is not usable: {one_line(error)}") from error
    turns = record.get("conversations", ())
    if not isinstance(turns, list | tuple) or not all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise DamagedSample(f"{where}: its conversation is no list of turns with a text each")
    captions = record.get("captions", ())
    if not isinstance(captions, list | tuple) or not all(isinstance(c, str) and c.strip() for c in captions):
        raise DamagedSample(f"{where}: has an empty caption, or one that is no text")
    return record


def names_picture(record: dict[str, Any]) -> bool:
    """Whether the record belongs to a picture that should be there."""
    return bool(record.get("file_name") or record.get("image")) and not record.get("image_missing")


def text_lengths(record: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Number of captions, and the characters of each example's text without its prompt (for bucketing)."""
    if captions := record.get("captions"):
        return len(captions), tuple(len(caption) for caption in captions)
    if turns := record.get("conversations"):
        return 0, (sum(len(turn["value"]) for turn in turns),)
    choices = record.get("choices")
    texts = [record.get("question"), record.get("hint"), *(choices if isinstance(choices, list) else ())]
    return 0, (sum(len(text) for text in texts if isinstance(text, str)),)


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


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())


def _sample_ranges(path: Path, shown: Path) -> Iterator[tuple[str, int, int]]:
    """Yields key, first byte and end of every sample; neighbours of one key belong together."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, begin, end = None, 0, 0
            while member := archive.next():
                # tarfile remembers every member; a shard of millions would fill the memory.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isreg():
                    continue
                found, _ = base_plus_ext(member.name)
                if found is None or found.startswith("/") or ".." in found.split("/"):
                    raise UserError(f"{shown}: member {member.name!r}: not KEY.EXTENSION inside the archive")
                if found != key:
                    if key is not None:
                        yield key, begin, end
                    key, begin = found, member.offset
                blocks = -(-member.size // tarfile.BLOCKSIZE)
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
            if key is not None:
                yield key, begin, end
            # Without the mark of its end an archive cut between two members looks whole.
            with path.open("rb") as file:
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise EOFError("its end is missing")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shown}: not a whole, uncompressed tar: {one_line(error)}; copy it again") from None
