"""The tensors of a checkpoint as its files hold them, read one at a time without loading the model (ours)."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .configuration import ModelError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that safetensors gives them."""

POINTER = "a git-LFS pointer in the file's place; run `git lfs pull` there"
_POINTER = b"version https://git-lfs"
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)


class StoredTensor(NamedTuple):
    """What a file says of one of its tensors; ``start`` is its first byte in a safetensors file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def num_elements(self) -> int:
        """Its values."""
        return math.prod(self.shape)


class StoredFile:
    """One open file of a checkpoint: safetensors, read by byte offsets, or ``.bin``.

    Zipped ``.bin`` files are mapped, where the system may read much of them ahead; those from before torch
    1.6 are held in memory, whole.

    Attributes:
        path: of the file.
        tensors: what it holds, by name.
    """

    path: Path
    tensors: dict[str, StoredTensor]

    def __init__(self, path: Path) -> None:
        """Opens a file and reads what it holds.

        Raises:
            ModelError: it is damaged.
        """
        self.path = path
        # By byte offsets, not safe_open: it maps the file, and reading ahead made a sketch read all 26 GB.
        self._file: Any = None
        self._loaded: dict[str, Tensor] = {}
        with _readable(path):
            _refuse_pointer(path)
            if path.suffix == ".safetensors":
                self._file = path.open("rb", buffering=0)
                try:
                    self.tensors = dict(self._header())
                except BaseException:
                    self._file.close()
                    raise
                return
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except (pickle.UnpicklingError, KeyError):
                raise ValueError(
                    "no file of tensors; save the model's state_dict, best as safetensors"
                ) from None
            if not isinstance(found, Mapping):
                raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
            self._loaded = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        self.tensors = {n: StoredTensor(tuple(t.shape), t.dtype) for n, t in self._loaded.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was read stays."""
        if self._file is not None:
            self._file.close()
        self._loaded = {}

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that it is stored in.

        Raises:
            ModelError: the file ends too early.
        """
        if self._file is None:
            return self._loaded[name]
        stored = self.tensors[name]
        with _readable(self.path):
            data = self._bytes(stored.start, stored.num_elements * stored.dtype.itemsize)
            flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
            return flat.view(stored.shape)

    def values(self, name: str, positions: Sequence[int]) -> list[Tensor]:
        """Single values of a tensor, at flat positions.

        Raises:
            ModelError: the file ends too early.
        """
        if self._file is None:
            # By index, since a flat view of a transposed tensor would be a copy.
            tensor = self._loaded[name]
            places = torch.tensor(positions, dtype=torch.int64)
            return list(tensor[torch.unravel_index(places, tensor.shape)]) if tensor.dim() else [tensor]
        _, dtype, start = self.tensors[name]
        with _readable(self.path):
            return [
                torch.frombuffer(self._bytes(start + position * dtype.itemsize, dtype.itemsize), dtype=dtype)
                for position in positions
            ]

    def _header(self) -> Iterator[tuple[str, StoredTensor]]:
        header_bytes = int.from_bytes(self._bytes(0, 8), "little")
        num_bytes, end = self.path.stat().st_size, 8 + header_bytes
        if end > num_bytes:
            raise ValueError("it ends too early, within its header")
        for name, entry in json.loads(self._bytes(8, header_bytes)).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
            end = max(end, stop)
            yield name, StoredTensor(tuple(entry["shape"]), dtype, start)
        if end > num_bytes:
            raise ValueError(f"it ends too early, after {num_bytes:,} of {end:,} bytes; copy it again")

    def _bytes(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        view, filled = memoryview(data), 0
        self._file.seek(start)
        while filled < count:
            got = self._file.readinto(view[filled:])
            if not got:
                raise ValueError("it ends too early")
            filled += got
        return data


def stored_tensors(source: str) -> dict[str, tuple[Path, StoredTensor]]:
    """File and entry of every tensor of a checkpoint, by its files' headers.

    Args:
        source: directory or hub id.

    Raises:
        ModelError: no weights are at hand, or a file is damaged or lacks what the index places in it.
    """
    places: dict[str, tuple[Path, StoredTensor]] = {}
    for path, promised in _checkpoint(source).items():
        with StoredFile(path) as file:
            if lacking := promised - file.tensors.keys():
                raise ModelError(f"{path}: lacks {min(lacking)}, which its index places there")
            places |= {name: (path, stored) for name, stored in file.tensors.items()}
    return places


def checkpoint_files(source: str) -> list[Path]:
    """The files that transformers would load; of a hub id those in the local cache where they are there.

    Args:
        source: directory or hub id.

    Raises:
        ModelError: no weights are at hand.
    """
    return list(_checkpoint(source))


def _checkpoint(source: str) -> dict[Path, set[str]]:
    """The files, and the tensors that an index places in each; none of them where there is no index."""
    try:
        return _find_files(source, local_only=True)
    except ModelError:
        if Path(source).is_dir():
            raise
    return _find_files(source, local_only=False)


def _find_files(source: str, *, local_only: bool) -> dict[Path, set[str]]:
    """The first that is there of the four kinds of checkpoint, in transformers' order."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = _cached(source, name, local_only=local_only)
        if path is None:
            continue
        if not name.endswith(".json"):
            return {path: set()}
        promised: dict[str, set[str]] = {}
        try:
            _refuse_pointer(path)
            for tensor, shard in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
                promised.setdefault(shard, set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{path}: not an index of shards: {error}") from None
        files: dict[Path, set[str]] = {}
        for shard in sorted(promised):
            file = _cached(source, shard, local_only=local_only)
            if file is None:
                raise ModelError(f"{source}: {shard} is missing, which {name} names")
            files[file] = promised[shard]
        return files
    others = sorted(p.name for p in Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    hint = f"; {others[0]} is of llama.cpp: take the model that it was made of" if others else ""
    raise ModelError(f"{source}: no weights found, neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}{hint}")


def is_pointer(path: Path) -> bool:
    """Whether git left a pointer in the file's place."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _refuse_pointer(path: Path) -> None:
    if is_pointer(path):
        raise ValueError(f"it is {POINTER}")


def _cached(source: str, name: str, *, local_only: bool) -> Path | None:
    """A file of a directory or hub id; None where there is none."""
    try:
        path = cached_file(
            source,
            name,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelError(f"{source}: {str(error).strip().splitlines()[0]}") from None
    return None if path is None else Path(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read: {reason}") from None
