"""A shard directory: its manifest, where each sample lies in the shards, and reading a sample at random.

A directory holds ``NAME.tar`` files (``shards.py``), ``index.npy`` (``ShardTable.rows`` of all shards),
``text_lengths.npy`` and ``manifest.json``, which is written last and vouches for the others. The index makes
every sample one byte range, so that the order (``stream.py``) is free of the order in the files.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data.shards import (
    DamagedSample,
    ShardRow,
    ShardTable,
    find_key,
    one_line,
    parse_members,
    publish,
    temporary_name,
    write_shard,
)
from dehvf_ds.data.storage import ShardFile, Storage, build_storage, is_remote

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
LENGTHS_NAME = "text_lengths.npy"
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._=-]*")


class ShardIndex:
    """A shard directory opened for reading at random.

    Opening reads the manifest, lists the directory and maps the index: milliseconds at any number of samples,
    microseconds a shard. Workers get their own instance by pickling (the directory is opened again) or by
    forking.

    Attributes:
        directory: the shard directory.
        manifest: the parsed ``manifest.json``.
        shard_names: file name of each shard, in the manifest's order.
        shard_rows: samples of each shard.
        shard_examples: examples of each shard when every caption is one.
        text_lengths: characters of each example's text (mapped, not read).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        location: str | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
    ):
        """Opens ``directory`` and checks that its parts agree.

        Args:
            directory: holds manifest and index.
            location: where the shards lie; None is ``directory``. See ``DataConfig``.
            cache_dir: local directory for copies of the shards; None reads them where they lie.
            cache_gb: largest size of the cache in GB.

        Raises:
            UserError: a part is missing, or contradicts the manifest.
        """
        self.directory = Path(directory)
        self._settings = {"location": location, "cache_dir": cache_dir, "cache_gb": cache_gb}
        self._location = str(directory) if location is None else location
        self.manifest = _read_manifest(self.directory)
        shards = self.manifest["shards"]
        self.shard_names: tuple[str, ...] = tuple(shard["name"] for shard in shards)
        self.shard_rows: tuple[int, ...] = tuple(shard["samples"] for shard in shards)
        self.shard_examples: tuple[int, ...] = tuple(shard["examples"] for shard in shards)
        self._ends = np.cumsum(self.shard_rows, dtype=np.int64)
        self._table: Int64[np.ndarray, "samples 4"] = self._map(INDEX_NAME, np.int64, (len(self), 4))
        self.text_lengths: Int32[np.ndarray, " examples"] = self._map(
            LENGTHS_NAME, np.int32, (sum(self.shard_examples),)
        )
        self._check_listing()
        self._storage: Storage = build_storage(
            [ShardFile(shard["name"], shard["bytes"], shard["sha256"]) for shard in shards],
            self._location,
            cache_dir=cache_dir,
            cache_bytes=cache_gb * 1e9,
        )

    @classmethod
    def of_training(cls, config: DataConfig) -> ShardIndex:
        """Opens the shards that a run trains on."""
        return cls(
            config.train, location=config.location, cache_dir=config.cache_dir, cache_gb=config.cache_gb
        )

    def __len__(self) -> int:
        """Number of samples (rows, not captions)."""
        return int(self.manifest["num_samples"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.directory, self._settings)

    def __del__(self) -> None:
        # A constructor that raised has none.
        if hasattr(self, "_storage"):
            self.close()

    @property
    def captions(self) -> Int64[np.ndarray, " samples"]:
        """Number of captions of each row, 0 where the row is of another task (mapped, not read)."""
        return self._table[:, 2]

    @property
    def num_without_captions(self) -> int:
        """Rows of a task other than captioning."""
        return sum(self.shard_examples) - int(self.manifest["num_captions"])

    def locate(self, sample_id: int) -> tuple[str, int, int]:
        """Where a sample lies: its shard's name, and the offset and size of its members in bytes."""
        offset, size = (int(value) for value in self._table[sample_id, :2])
        return self.shard_names[self._shard_of(sample_id)], offset, size

    def read(self, sample_id: int) -> dict[str, Any]:
        """Reads one sample's members: ``__key__`` and ``__url__`` (str), and bytes by member name.

        Raises:
            DamagedSample: the bytes cannot be read, or are not those that the index was made of.
        """
        shard = self._shard_of(sample_id)
        offset, size, _, checksum = (int(value) for value in self._table[sample_id])
        where = f"{self._location}: {self.shard_names[shard]}: sample {sample_id}"
        # A damaged index may ask for more than there is memory.
        fits = 0 <= offset <= offset + size <= self.manifest["shards"][shard]["bytes"]
        data = self._storage.read(shard, offset, size) if fits else b""
        if len(data) != size or zlib.crc32(data) != checksum:
            raise DamagedSample(
                f"{where} ({size} bytes at {offset}): not the bytes that the index was made of; copy the "
                f"shard again, or see what else is damaged: tools/build_shards.py verify {self.directory}"
            )
        return parse_members(data, where)

    def check_sizes(self) -> None:
        """Compares the shards' sizes with the manifest's; one look at each file, so one process is enough.

        Raises:
            UserError: a file has another size.
        """
        if is_remote(self._location):
            return
        paths = [Path(self._location) / name for name in self.shard_names]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda path: path.stat().st_size, paths)
            for path, num_bytes, shard in zip(paths, found, self.manifest["shards"], strict=True):
                if num_bytes != shard["bytes"]:
                    promised = f"{MANIFEST_NAME} promises {shard['bytes']}"
                    raise UserError(f"{path}: {num_bytes} bytes where {promised}; copy the shard again")

    def close(self) -> None:
        """Closes what reads have opened; a later read opens it again."""
        self._storage.close()

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return int(np.searchsorted(self._ends, sample_id, side="right"))

    def _map(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; {self._remedy()}")
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not an index: {one_line(error)}; {self._remedy()}") from None
        if table.shape != shape or table.dtype != dtype:
            promised = f"{MANIFEST_NAME} promises {np.dtype(dtype)} {shape}"
            raise UserError(f"{path}: {table.dtype} {table.shape} where {promised}; copy both again")
        return table

    def _remedy(self) -> str:
        return f"make it again: tools/build_shards.py index {self.directory} --overwrite"

    def _check_listing(self) -> None:
        """Looks for the shards in one listing, cheaper for a metadata server than many looks."""
        if is_remote(self._location):
            return
        try:
            there = {path.name for path in Path(self._location).iterdir()}
        except OSError as error:
            raise UserError(f"data.location {self._location}: {one_line(error)}") from None
        if missing := [name for name in self.shard_names if name not in there]:
            others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            path = Path(self._location) / missing[0]
            raise UserError(f"{path}: no such shard{others}, but {MANIFEST_NAME} names it; copy it again")


def write_shards(
    rows: Iterable[ShardRow], output: Path, *, name: str, samples_per_shard: int, builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes rows as a shard directory, one shard after another; for small sets.

    Args:
        rows: the samples, in the order in which they are stored.
        output: the directory; created.
        name: the shards' name before ``-%06d.tar``.
        samples_per_shard: samples of a shard; the last may hold fewer.
        builder: the arguments of the builder, kept in the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: there is no row, or one is not fit.
    """
    output.mkdir(parents=True, exist_ok=True)
    names, tables = [], []
    rows = iter(rows)
    while group := list(islice(rows, samples_per_shard)):
        names.append(shard_name(name, len(names)))
        tables.append(write_shard(group, output / names[-1]))
    return write_index(output, names, tables, builder)


def shard_name(name: str, number: int) -> str:
    """File name of a builder's shard."""
    return f"{name}-{number:06d}.tar"


def write_index(
    directory: Path, names: Sequence[str], tables: Sequence[ShardTable], builder: dict[str, Any]
) -> dict[str, Any]:
    """Writes index, text lengths and, last, the manifest of finished shards.

    Args:
        directory: where the shards lie.
        names: their file names, in order.
        tables: their scans.
        builder: what made them, kept in the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: there is no sample, or a key stands in two shards.
    """
    if not sum(len(table.rows) for table in tables):
        raise UserError(f"{directory}: there is no sample to index; look at the arguments")
    _check_unique(directory, names, tables)
    arrays = {
        INDEX_NAME: np.concatenate([table.rows for table in tables]),
        LENGTHS_NAME: np.concatenate([table.text_lengths for table in tables]),
    }
    for file_name, array in arrays.items():
        with temporary_name(directory / file_name).open("wb") as file:
            np.save(file, array)
        publish(directory / file_name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(arrays[INDEX_NAME]),
        "num_captions": int(arrays[INDEX_NAME][:, 2].sum()),
        "shards": [
            {
                "name": name,
                "samples": len(table.rows),
                "examples": len(table.text_lengths),
                "bytes": table.num_bytes,
                "sha256": table.sha256,
            }
            for name, table in zip(names, tables, strict=True)
        ],
        "builder": builder,
    }
    path = directory / MANIFEST_NAME
    temporary_name(path).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    publish(path)
    return manifest


def _check_unique(directory: Path, names: Sequence[str], tables: Sequence[ShardTable]) -> None:
    hashes = np.concatenate([table.key_hashes for table in tables])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(same):
        ends = np.cumsum([len(table.key_hashes) for table in tables])
        rows = order[same[0] : same[0] + 2]
        first, second = (names[int(i)] for i in np.searchsorted(ends, rows, side="right"))
        key = find_key(directory / first, int(hashes[rows[0]]))
        raise UserError(f"{directory}: key {key!r} is given to two samples, in {first} and in {second}")


def _reopen(directory: Path, settings: dict[str, Any]) -> ShardIndex:
    return ShardIndex(directory, **settings)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; build shards with tools/build_shards.py")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; build shards with tools/build_shards.py (it is written last), or index "
            f"those of another tool: tools/build_shards.py index {directory}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, num_samples = manifest["format_version"], manifest["num_samples"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}; make it again: "
                f"tools/build_shards.py index {directory} --overwrite"
            )
        samples = 0
        for shard in manifest["shards"]:
            samples += int(shard["samples"])
            if not _PLAIN_FILE_NAME.fullmatch(shard["name"]):
                raise ValueError(f"shard name {shard['name']!r} is not a plain file name")
            _ = int(shard["examples"]), int(shard["bytes"]), str(shard["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise UserError(f"{path}: not a manifest of shards: {reason}; make it again") from None
    if num_samples != samples:
        raise UserError(f"{path}: num_samples {num_samples} is not the sum over its shards; make it again")
    if num_samples < 1:
        raise UserError(f"{path}: names no sample; make it again")
    return manifest
