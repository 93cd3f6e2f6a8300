"""An opened shard directory: its manifest, where each sample is, and reading samples in any order.

``index.npy`` (``ShardTable.rows`` of all shards) and ``text_lengths.npy`` are beside ``manifest.json``, which
is written last. The index makes every sample one byte range.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from dehvf_ds.config import DataConfig, UserError, looked_in
from dehvf_ds.data.prompts import Task
from dehvf_ds.data.shards import DamagedSample, one_line, parse_members
from dehvf_ds.data.storage import FULL_DISK, ShardFile, build_storage, is_remote, shown

FORMAT_VERSION = 3
OLDER_VERSIONS = (2,)
"""Also read: without counts of pictures and tasks, so that rows are only checked as they are read."""

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
LENGTHS_NAME = "text_lengths.npy"
PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._=-]*")


class ShardIndex:
    """A shard directory opened for reading in any order.

    Opening reads the manifest, lists the directory and maps the index: milliseconds at any number of samples,
    microseconds a shard. Workers get their own instance by pickling (the directory is opened again) or by
    forking.

    Attributes:
        shard_names: file name of each shard, in the manifest's order.
        shard_rows: samples of each shard.
        shard_examples: examples of each shard, every caption counted as one.
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
        """Opens ``directory`` and checks that its parts agree; the rest as in ``DataConfig``."""
        self.directory = Path(directory)
        self._settings = {"location": location, "cache_dir": cache_dir, "cache_gb": cache_gb}
        self._location = str(directory) if location is None else location
        self.manifest = read_manifest(self.directory)
        shards = self.manifest["shards"]
        self.shard_names: tuple[str, ...] = tuple(shard["name"] for shard in shards)
        self.shard_rows: tuple[int, ...] = tuple(shard["samples"] for shard in shards)
        self.shard_examples: tuple[int, ...] = tuple(shard["examples"] for shard in shards)
        self._ends = np.cumsum(self.shard_rows, dtype=np.int64)
        self._table, self.text_lengths = open_tables(self.directory, self.manifest)
        self._check_listing()
        self._storage = build_storage(
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
        return partial(ShardIndex, **self._settings), (self.directory,)

    def __del__(self) -> None:
        # Missing if the constructor raised.
        if hasattr(self, "_storage"):
            self.close()

    @property
    def digest(self) -> str:
        """Identifies this data set wherever it is: a hash of its shards' hashes and numbers of samples.

        Manifests of earlier versions keep the digest that they had, so that runs on them can be resumed.
        """
        counts = self.manifest["format_version"] not in OLDER_VERSIONS
        shards = [f"{s['sha256']}:{s['samples']}" if counts else s["sha256"] for s in self.manifest["shards"]]
        return hashlib.sha256(",".join(shards).encode()).hexdigest()

    @property
    def captions(self) -> Int64[np.ndarray, " samples"]:
        """Number of captions of each row, 0 for rows of another task (mapped, not read)."""
        return self._table[:, 2]

    @property
    def num_without_captions(self) -> int:
        """Rows of a task other than captioning."""
        return sum(self.shard_examples) - int(self.manifest["num_captions"])

    def locate(self, sample_id: int) -> tuple[str, int, int]:
        """The name of a sample's shard, and the offset and size of its members in bytes."""
        offset, size = (int(value) for value in self._table[sample_id, :2])
        return self.shard_names[self._shard_of(sample_id)], offset, size

    def read(self, sample_id: int) -> dict[str, Any]:
        """Reads one sample's members: ``__key__`` and ``__url__`` (str), and bytes by member name.

        Raises:
            DamagedSample: the bytes cannot be read, or are not those that the index was made of.
            OSError: the temporary directory is full.
        """
        shard = self._shard_of(sample_id)
        offset, size, _, checksum = (int(value) for value in self._table[sample_id])
        where = f"{shown(self._location)}: {self.shard_names[shard]}: sample {sample_id}"
        # A damaged index may ask for more than there is memory.
        fits = 0 <= offset <= offset + size <= self.manifest["shards"][shard]["bytes"]
        try:
            data = self._storage.read(shard, offset, size) if fits else b""
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            raise DamagedSample(f"{where}: cannot be read: {one_line(error)}") from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise DamagedSample(
                f"{where} ({size} bytes at {offset}): not the bytes that the index was made of; copy the "
                f"shard again, or look for other damage: tools/build_shards.py verify {self.directory}"
            )
        members = parse_members(data, where)
        if self.manifest.get("key_prefix") == "shard":
            members["__key__"] = f"{self.shard_names[shard].removesuffix('.tar')}/{members['__key__']}"
        return members

    def check_task(self, task: Task, flag: str = "data.task") -> None:
        """Refuses rows of a task other than the one set by ``flag``, and captions without a picture."""
        # Manifests of format 2 only count captions.
        captions, others = len(self) - self.num_without_captions, self.num_without_captions
        found = {"caption": captions, "another task" if task == "caption" else task: others}
        found = self.manifest.get("tasks", found)
        if held := {name: count for name, count in found.items() if name != task and count}:
            listed = ", ".join(f"{count} rows for {name}" for name, count in held.items())
            raise UserError(
                f"{self.directory}: holds {listed}, not only for {flag} {task}; set {flag} to the shards' "
                "own task, or build shards for each task"
            )
        lost = len(self) - self.manifest.get("num_pictures", len(self))
        if task == "caption" and lost:
            raise UserError(
                f"{self.directory}: {lost} of {len(self)} captions have no picture; make the index again: "
                f"tools/build_shards.py index {self.directory} --overwrite --skip-bad"
            )

    def check_sizes(self) -> None:
        """Refuses shards whose size is not the manifest's; looks at each file, so one process should."""
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
        """Closes all open shards; a later read opens its shard again."""
        self._storage.close()

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return int(np.searchsorted(self._ends, sample_id, side="right"))

    def _check_listing(self) -> None:
        """Looks for the shards in one listing, which a metadata server answers faster than many lookups."""
        if is_remote(self._location):
            return
        try:
            listed = {path.name for path in Path(self._location).iterdir()}
        except OSError as error:
            raise UserError(f"data.location {self._location}: {one_line(error)}") from None
        if missing := [name for name in self.shard_names if name not in listed]:
            first, count = Path(self._location) / missing[0], len(missing)
            raise UserError(f"{first}: no such shard, but {MANIFEST_NAME} names it ({count} missing in all)")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks a shard directory's manifest."""
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        where = looked_in(directory)
        raise UserError(f"{directory}: no such directory{where}; build shards with tools/build_shards.py")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; build shards with tools/build_shards.py (which writes it last), or index "
            f"those of another tool: tools/build_shards.py index {directory}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, num_samples = manifest["format_version"], manifest["num_samples"]
        if version not in (FORMAT_VERSION, *OLDER_VERSIONS):
            raise UserError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}; make it again: "
                f"tools/build_shards.py index {directory} --overwrite"
            )
        for shard in manifest["shards"]:
            if not PLAIN_FILE_NAME.fullmatch(shard["name"]):
                raise ValueError(f"shard name {shard['name']!r} is not a plain file name")
            _ = int(shard["examples"]), int(shard["bytes"]), str(shard["sha256"])
        if version == FORMAT_VERSION:
            _ = int(manifest["num_pictures"]), dict(manifest["tasks"])
            if manifest["key_prefix"] not in (None, "shard"):
                raise ValueError(f"key_prefix {manifest['key_prefix']!r}")
        if num_samples != sum(int(shard["samples"]) for shard in manifest["shards"]):
            raise ValueError(f"num_samples {num_samples} is not the sum over its shards")
        if num_samples < 1:
            raise ValueError("it names no sample")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise UserError(f"{path}: not a manifest of shards: {reason}; make it again") from None
    return manifest


def open_tables(
    directory: Path, manifest: dict[str, Any]
) -> tuple[Int64[np.ndarray, "samples 4"], Int32[np.ndarray, " examples"]]:
    """Maps ``index.npy`` and ``text_lengths.npy``, whose shapes must be the manifest's; reads nothing."""
    tables = []
    num_examples = sum(shard["examples"] for shard in manifest["shards"])
    shapes = {INDEX_NAME: (np.int64, (manifest["num_samples"], 4)), LENGTHS_NAME: (np.int32, (num_examples,))}
    for name, (dtype, shape) in shapes.items():
        path = directory / name
        remedy = f"make it again: tools/build_shards.py index {directory} --overwrite"
        if not path.is_file():
            raise UserError(f"{path}: no such file; {remedy}")
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not an index: {one_line(error)}; {remedy}") from None
        if table.shape != shape or table.dtype != dtype:
            promised = f"{MANIFEST_NAME} promises {np.dtype(dtype)} {shape}"
            raise UserError(f"{path}: {table.dtype} {table.shape} where {promised}; copy both again")
        tables.append(table)
    return tables[0], tables[1]
