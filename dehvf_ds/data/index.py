"""Shards on disk: tar files, where each sample lies in them, and the manifest that vouches for both.

A shard directory holds ``NAME-%06d.tar`` (WebDataset: ``KEY.jpg|png|webp``, absent for a text-only row, and
``KEY.json``, the record), ``index.npy`` and ``manifest.json``. The index makes every sample one byte
range, so that the order (``stream.py``) is free of the order in the files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from dehvf_ds.config import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
IMAGE_MEMBERS = ("jpg", "png", "webp")
"""Member names that hold a sample's picture."""

REQUIRED_MEMBERS = ("json",)
MAX_OPEN_SHARDS = 64
# Two zero blocks end a tar archive; a byte range from its middle has none.
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One sample as the builders write it.

    Attributes:
        key: unique in the data set, free of dots and slashes.
        members: bytes by member name: ``json`` and at most one of ``IMAGE_MEMBERS``.
        captions: number of captions of the row; 0 for a row of another task.
    """

    key: str
    members: dict[str, bytes]
    captions: int = 0


class ShardIndex:
    """A shard directory opened for reading at random.

    Opening reads the manifest and maps the index: it costs milliseconds at any size. Workers get
    their own instance by pickling (the directory is opened again) or by forking (reads keep no position).

    Attributes:
        directory: the shard directory.
        manifest: the parsed ``manifest.json``.
        shard_rows: samples of each shard, in the manifest's order.
    """

    def __init__(self, directory: str | Path):
        """Opens ``directory`` and checks that its parts agree.

        Raises:
            UserError: a part is missing, or contradicts the manifest.
        """
        self._open_files: OrderedDict[int, int] = OrderedDict()
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self._names: list[str] = [shard["name"] for shard in self.manifest["shards"]]
        self.shard_rows: tuple[int, ...] = tuple(shard["samples"] for shard in self.manifest["shards"])
        self._ends = np.cumsum(self.shard_rows, dtype=np.int64)
        self._table = self._open_table()
        self._check_shards()

    @classmethod
    def open(cls, directory: str | Path) -> ShardIndex:
        """Opens a shard directory; the same as the constructor."""
        return cls(directory)

    def __len__(self) -> int:
        """Number of samples (rows, not captions)."""
        return int(self.manifest["num_samples"])

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[Path]]:
        return type(self), (self.directory,)

    def __del__(self) -> None:
        self.close()

    @property
    def captions(self) -> Int64[np.ndarray, " samples"]:
        """Number of captions of each row; 0 where the row is of another task."""
        return self._table[:, 2]

    def locate(self, sample_id: int) -> tuple[Path, int, int]:
        """Where a sample lies: its shard's path, and the offset and size of its members in bytes."""
        shard = self._shard_of(sample_id)
        offset, size, _ = (int(value) for value in self._table[sample_id])
        return self.directory / self._names[shard], offset, size

    def read(self, sample_id: int) -> dict[str, Any]:
        """Reads one sample's members: ``__key__`` (a str) and bytes by member name.

        Raises:
            UserError: the bytes are cut short, are no tar members, or lack a required one.
        """
        path, offset, size = self.locate(sample_id)
        try:
            data = os.pread(self._descriptor(self._shard_of(sample_id)), size, offset)
            samples = list(group_by_keys(_members(data, str(path)))) if len(data) == size else []
        except (tarfile.TarError, ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path}: cannot read sample {sample_id}: {_line(error)}; copy the shard again"
            ) from error
        if len(samples) != 1 or any(name not in samples[0] for name in REQUIRED_MEMBERS):
            raise UserError(
                f"{path}: sample {sample_id} ({size} bytes at {offset}) is damaged or lacks its .json; "
                "copy the shard again or rebuild it with tools/build_shards.py"
            )
        return samples[0]

    def close(self) -> None:
        """Closes the shards that reads have opened; a later read opens them again."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return int(np.searchsorted(self._ends, sample_id, side="right"))

    def _descriptor(self, shard: int) -> int:
        """An open file of the shard; opening it for each read would load a file system's metadata server."""
        if shard not in self._open_files:
            if len(self._open_files) >= MAX_OPEN_SHARDS:
                os.close(self._open_files.popitem(last=False)[1])
            self._open_files[shard] = os.open(self.directory / self._names[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._open_files.move_to_end(shard)
        return self._open_files[shard]

    def _open_table(self) -> Int64[np.ndarray, "samples 3"]:
        path = self.directory / INDEX_NAME
        if not path.is_file():
            raise UserError(f"{path}: no such file; build the shards again with tools/build_shards.py")
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not an index: {_line(error)}; build the shards again") from None
        expected = (len(self), 3)
        if table.shape != expected or table.dtype != np.int64:
            raise UserError(
                f"{path}: {table.dtype} {table.shape} where {MANIFEST_NAME} promises int64 {expected}; "
                "copy both again or build the shards again"
            )
        return table

    def _check_shards(self) -> None:
        first = 0
        for shard, end in zip(self.manifest["shards"], self._ends.tolist(), strict=True):
            path = self.directory / shard["name"]
            if not path.is_file():
                raise UserError(
                    f"{path}: no such shard, but {MANIFEST_NAME} names it; copy it or build the shards again"
                )
            found = path.stat().st_size
            if found != shard["bytes"]:
                promised = f"{MANIFEST_NAME} promises {shard['bytes']}"
                raise UserError(f"{path}: {found} bytes where {promised}; copy the shard again")
            if end > first:
                last_byte = int(self._table[end - 1, 0] + self._table[end - 1, 1])
                if int(self._table[first, 0]) != 0 or last_byte > found:
                    table = self.directory / INDEX_NAME
                    raise UserError(f"{table}: disagrees with {shard['name']}; copy both again or rebuild")
            first = end


def write_shards(
    rows: Iterable[ShardRow], output: Path, *, name: str, samples_per_shard: int, builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes a shard directory; the same rows and arguments give the same bytes.

    Files get their names when they are whole, the manifest last: a directory without one is unfinished.

    Args:
        rows: the samples, in the order in which they are stored.
        output: the directory; created, and refused when it holds anything.
        name: the shards' name before ``-%06d.tar``.
        samples_per_shard: samples of a shard; the last may hold fewer.
        builder: the arguments of the builder, kept in the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: ``output`` is not empty, there is no row, or a key is not fit or not unique.
    """
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise UserError(f"{output}: not empty; give another --output or remove what lies there")
    shards: list[dict[str, Any]] = []
    table: list[tuple[int, int, int]] = []
    keys: set[str] = set()
    rows = iter(rows)
    while row := next(rows, None):
        path = output / f"{name}-{len(shards):06d}.tar"
        written = len(table)
        with _renamed(path).open("wb") as file, _tar_writer(file) as writer:
            while row is not None:
                _check_key(row, keys)
                begin = writer.tarstream.offset
                writer.write({"__key__": row.key, **row.members})
                table.append((begin, writer.tarstream.offset - begin, row.captions))
                row = next(rows, None) if len(table) - written < samples_per_shard else None
        shards.append({"name": path.name, "samples": len(table) - written, **_publish(path)})
    if not shards:
        raise UserError(f"{output}: there is no sample to write; look at the arguments")
    with _renamed(output / INDEX_NAME).open("wb") as file:
        np.save(file, np.asarray(table, dtype=np.int64))
    _publish(output / INDEX_NAME)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(table),
        "num_captions": sum(captions for _, _, captions in table),
        "shards": shards,
        "builder": builder,
    }
    _renamed(output / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _publish(output / MANIFEST_NAME)
    return manifest


def _tar_writer(file: io.BufferedWriter) -> TarWriter:
    # Fixed owner, mode and time: the bytes depend on the samples alone.
    return TarWriter(file, user="dehvf", group="dehvf", mode=0o644, mtime=0, encoder=False, compress=False)


def _check_key(row: ShardRow, keys: set[str]) -> None:
    if not row.key or "." in row.key or "/" in row.key:
        raise UserError(f"key {row.key!r}: empty, or has a dot or slash, where WebDataset would split it")
    if row.key in keys:
        raise UserError(f"key {row.key!r}: given to two samples")
    keys.add(row.key)


def _renamed(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _publish(path: Path) -> dict[str, Any]:
    """Gives a finished file its name; returns its size and hash."""
    with _renamed(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _renamed(path).rename(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _members(data: bytes, url: str) -> Iterator[dict[str, Any]]:
    # webdataset annotates an open archive where it takes a stream.
    stream: Any = io.BytesIO(data + END_OF_ARCHIVE)
    for member in tar_file_iterator(stream):
        yield {**member, "__url__": url}


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; build shards with tools/build_shards.py")
    if not path.is_file():
        raise UserError(f"{path}: no such file; build shards with tools/build_shards.py (it is written last)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, num_samples = manifest["format_version"], manifest["num_samples"]
        sizes = [(str(s["name"]), int(s["samples"]), int(s["bytes"])) for s in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of shards: {type(error).__name__} {_line(error)}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; build again")
    if num_samples != sum(samples for _, samples, _ in sizes):
        raise UserError(f"{path}: num_samples {num_samples} is not the sum over its shards; build again")
    if num_samples < 1:
        raise UserError(f"{path}: names no sample; build again")
    return manifest


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
