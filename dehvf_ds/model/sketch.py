"""A sketch of a checkpoint's weights: of every tensor its shape and a few values (ours).

It is computed from the checkpoint's files, at places that depend on a tensor's size alone. So it stays the
same under another sharding, and in ``.bin`` or safetensors. Fine-tuning changes nearly all values of the
matrices, so four of each tell the models apart; ``identity.py`` compares.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

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

NUM_VALUES = 4
# Module names that hold the wanted part of a checkpoint with several parts.
VISION_PARTS = {"vision_model", "vision_tower", "visual"}
LANGUAGE_PARTS = {"language_model", "text_model"}
# Buffers that older checkpoints store, and layers that transformers does not load.
_NOT_WEIGHTS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked)$|^mtp\.")
# The names that safetensors gives to dtypes.
_DTYPES = {
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
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)


def sketch_weights(source: str, *, vision: bool) -> dict[str, str]:
    """Samples a few values of every tensor of a checkpoint, without loading the model.

    Of safetensors files only those values are read (0.15 s for 26 GB). Zipped ``.bin`` files are mapped,
    where the system may read much of them ahead; older ``.bin`` files are loaded one at a time. The result is
    kept for the process until a file changes.

    Args:
        source: directory or hub id; the files of a hub id come from the local cache, or are downloaded as
            ``from_pretrained`` would.
        vision: whether the tower is wanted: of a two-tower checkpoint the vision part alone, of a multimodal
            one the language part otherwise.

    Returns:
        By tensor name, as the files have it, ``"32x48 0.125 -0.5 ..."``: the shape, then up to four values in
        fp32, at 9 digits without loss. A scalar has the shape ``"1"``.

    Raises:
        ModelError: no weights are at hand, or a file is damaged.
    """
    files = []
    for path in _checkpoint_files(source):
        stat = path.stat()
        files.append((path, stat.st_mtime_ns, stat.st_size))
    return _select_part(_sketch_files(tuple(files)), vision=vision)


def sample_positions(num_elements: int) -> list[int]:
    """Places that are sampled in a flat tensor: a function of its size, so that a new name moves none.

    Multiples of the golden ratio, modulo 1, spread evenly (Knuth's multiplicative hashing).

    Args:
        num_elements: of the tensor.

    Returns:
        At most ``NUM_VALUES`` rising positions in ``0..num_elements - 1``.
    """
    fractions = [(i + 1) * 2654435769 % 2**32 for i in range(NUM_VALUES)]
    return sorted({num_elements * fraction >> 32 for fraction in fractions} if num_elements else set())


def natural_key(name: str) -> list[str | int]:
    """Key of a tensor's name that sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _select_part(sketch: Mapping[str, str], *, vision: bool) -> dict[str, str]:
    """The tower or the decoder of a checkpoint; all of it where it has no such parts."""
    parts = VISION_PARTS if vision else LANGUAGE_PARTS
    inside = {name for name in sketch if parts.intersection(name.split(".")[:3])}
    if inside and not vision:
        inside |= {name for name in sketch if name.split(".")[-2:-1] == ["lm_head"]}
    return {name: text for name, text in sketch.items() if not inside or name in inside}


def _checkpoint_files(source: str) -> list[Path]:
    """The files that transformers would load; of a hub id those in the local cache where they are there."""
    try:
        return _find_files(source, local_only=True)
    except ModelError:
        if Path(source).is_dir():
            raise
    return _find_files(source, local_only=False)


def _find_files(source: str, *, local_only: bool) -> list[Path]:
    """The first that is there of the four kinds of checkpoint, in transformers' order."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = _cached(source, name, local_only=local_only)
        if path is None:
            continue
        if not name.endswith(".json"):
            return [path]
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            raise ModelError(f"{path}: not an index of shards") from None
        files = {shard: _cached(source, shard, local_only=local_only) for shard in shards}
        missing = [shard for shard, file in files.items() if file is None]
        if missing:
            raise ModelError(f"{source}: {missing[0]} is missing, which {name} names")
        return [file for file in files.values() if file is not None]
    raise ModelError(f"{source}: no weights found, neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


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


@lru_cache(maxsize=8)
def _sketch_files(files: tuple[tuple[Path, int, int], ...]) -> dict[str, str]:
    """Sketches all tensors of some files, given as path, time of change in ns and size in bytes."""
    sketch = {}
    for path, _, _ in files:
        try:
            sketch.update(_sketch_safetensors(path) if path.suffix == ".safetensors" else _sketch_bin(path))
        except _UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{path}: cannot be read: {reason}") from None
    return {name: sketch[name] for name in sorted(sketch, key=natural_key)}


def _sketch_safetensors(path: Path) -> Iterator[tuple[str, str]]:
    # By byte offsets, not safe_open: it maps the file, and reading ahead at each place made it read 26 GB.
    with path.open("rb", buffering=0) as file:
        header_bytes = int.from_bytes(_read(file, 0, 8), "little")
        if header_bytes > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(_read(file, 8, header_bytes))
        for name, entry in header.items():
            if name == "__metadata__" or not _is_weight(name, entry["shape"]):
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            dtype = _DTYPES[entry["dtype"]]
            start = 8 + header_bytes + entry["data_offsets"][0]
            values = [
                torch.frombuffer(_read(file, start + position * dtype.itemsize, dtype.itemsize), dtype=dtype)
                for position in sample_positions(math.prod(entry["shape"]))
            ]
            yield name, _sketch_text(entry["shape"], values)


def _read(file: io.FileIO, start: int, count: int) -> bytearray:
    file.seek(start)
    data = bytearray(file.read(count))
    if len(data) < count:
        raise ValueError("it ends too early")
    return data


def _sketch_bin(path: Path) -> Iterator[tuple[str, str]]:
    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and _is_weight(name, list(tensor.shape)):
            yield name, _sketch_text(list(tensor.shape), _values(tensor))


def _is_weight(name: str, shape: list[int]) -> bool:
    causal_mask = name.endswith((".attn.bias", ".attention.bias")) and shape[:2] == [1, 1]
    return not causal_mask and _NOT_WEIGHTS.search(name) is None


def _values(tensor: Tensor) -> list[Tensor]:
    """The sampled values, by index since a flat view of a transposed tensor would be a copy."""
    positions = torch.tensor(sample_positions(tensor.numel()), dtype=torch.int64)
    return list(tensor[torch.unravel_index(positions, tensor.shape)]) if tensor.dim() else [tensor]


def _sketch_text(shape: list[int], values: list[Tensor]) -> str:
    numbers = [f"{value.to(torch.float32).item():.9g}" for value in values]
    return " ".join(["x".join(map(str, shape)) or "1", *numbers])
