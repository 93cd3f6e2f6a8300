"""Which base model a directory holds, by its files alone, whose tensors are read one at a time (ours).

The fingerprint of a checkpoint is the shape and four values of every tensor, at positions that depend on its
size alone. Fine-tuning changes nearly all values of the matrices, so four of each distinguish models;
sharding, file format and prefixes of the names change nothing. A conversion between fp32, fp16 and bf16 moves
values by one rounding step, which ``differences`` allows.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .configuration import ModelError

POINTER = "a git-LFS pointer instead of the file; run `git lfs pull` there"
_POINTER = b"version https://git-lfs"
# Module names of the part to use in a checkpoint with several parts.
VISION_PARTS = {"vision_model", "vision_tower", "visual"}
LANGUAGE_PARTS = {"language_model", "text_model"}
# First words of a tensor's name that only name wrapping modules; versions of transformers differ in them.
_WRAPPERS = VISION_PARTS | LANGUAGE_PARTS | {"model", "transformer", "base_model", "gpt_neox"}
# Buffers that older checkpoints store, and layers that transformers does not load.
_NOT_WEIGHTS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked)$|^mtp\.")
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
# Values that are read at a time where they change their dtype or device.
_BUFFERED_VALUES = 2**22


class StoredTensor(NamedTuple):
    """A tensor by its file's header; ``start`` is its first byte, in safetensors."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def num_elements(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def is_quantised(self) -> bool:
        """Whether it holds integers or 8-bit floats, which mean nothing without scales."""
        return not self.dtype.is_floating_point or self.dtype.itemsize == 1


class StoredFile:
    """One file of a checkpoint, safetensors or ``.bin``; damaged ones raise ``ModelError``.

    A safetensors file is open only while it is read. A ``.bin`` is mapped as long as this object lives, or
    held in memory if it was written before torch 1.6 (not zipped).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded: dict[str, Tensor] | None = None
        with _readable(path):
            if path.suffix == ".safetensors":
                self.tensors = self._header()
                return
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            self._loaded = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        self.tensors = {n: StoredTensor(path, tuple(t.shape), t.dtype) for n, t in self._loaded.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that it is stored in."""
        if self._loaded is not None:
            return self._loaded[name]
        _, shape, dtype, start = self.tensors[name]
        (data,) = self._bytes([start], self.tensors[name].num_elements * dtype.itemsize)
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)

    def values(self, name: str, positions: Sequence[int]) -> list[float]:
        """Single values of a tensor, by their positions in it flattened, in fp32."""
        if self._loaded is not None:
            found = self._loaded[name].flatten()[torch.tensor(positions, dtype=torch.int64)]
        else:
            _, _, dtype, start = self.tensors[name]
            data = self._bytes([start + place * dtype.itemsize for place in positions], dtype.itemsize)
            found = torch.frombuffer(bytearray().join(data), dtype=dtype) if data else torch.empty(0)
        return found.to(torch.float32).tolist()

    def _header(self) -> dict[str, StoredTensor]:
        size = self.path.stat().st_size
        start = 8 + int.from_bytes(self._bytes([0], 8)[0], "little")
        if start > size:
            raise ValueError("it ends too early, within its header")
        entries = json.loads(self._bytes([8], start - 8)[0])
        entries.pop("__metadata__", None)
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end > size:
            raise ValueError(f"it ends too early, after {size:,} of {end:,} bytes; copy it again")
        return {
            name: StoredTensor(
                self.path,
                tuple(entry["shape"]),
                str_to_torch_dtype[entry["dtype"]],
                start + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }

    def _bytes(self, starts: Sequence[int], count: int) -> list[bytearray]:
        # Not by safe_open, which maps the file: readahead then read all 26 GB for four values a tensor. The
        # buffer is small for the same reason.
        parts = []
        with _readable(self.path), io.BufferedReader(io.FileIO(self.path), 4096) as file:
            for start in starts:
                file.seek(start)
                parts.append(bytearray(count))
                if file.readinto(parts[-1]) < count:
                    raise ValueError("it ends too early")
        return parts


@contextmanager
def reading_ranges(path: Path) -> Iterator[Callable[[StoredTensor, int, Tensor], None]]:
    """Opens a safetensors file to read parts of its tensors, by ``read(tensor, first, target)``.

    That fills ``target``, one-dimensional and on any device, with the tensor's values from the ``first`` on,
    in the dtype of ``target``.
    """
    buffer = torch.empty(0)

    def read(tensor: StoredTensor, first: int, target: Tensor) -> None:
        nonlocal buffer
        file.seek(tensor.start + first * tensor.dtype.itemsize)
        if target.dtype == tensor.dtype and target.device.type == "cpu":
            fill(target)
            return
        if buffer.dtype != tensor.dtype or not len(buffer):
            buffer = torch.empty(_BUFFERED_VALUES, dtype=tensor.dtype)
        for part in target.split(_BUFFERED_VALUES):
            fill(buffer[: len(part)])
            part.copy_(buffer[: len(part)])

    def fill(target: Tensor) -> None:
        with _readable(path):
            _fill(file, target)

    with _readable(path):
        file = io.FileIO(path)
    # Without it: what else fails within, such as the GPU's memory, is no fault of the file.
    with file:
        yield read


def _fill(file: io.FileIO, target: Tensor) -> None:
    """Reads the next bytes of a file into a tensor's memory."""
    space = memoryview(target.view(torch.uint8).numpy().data)
    while space:
        # Linux returns 2 GiB at most.
        count = file.readinto(space)
        if not count:
            raise ValueError("it ends too early")
        space = space[count:]


def stored_tensors(source: str) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint (directory or hub id), by its files' headers."""
    found: dict[str, StoredTensor] = {}
    for path, promised in _checkpoint_files(source).items():
        tensors = StoredFile(path).tensors
        if lacking := promised - tensors.keys():
            raise ModelError(f"{path}: lacks {min(lacking)}, which its index places there")
        found |= tensors
    return found


def _checkpoint_files(source: str) -> dict[Path, set[str]]:
    """The files that transformers would load, each with the tensors that an index places in it."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = _find_file(source, name)
        if path is None:
            continue
        if not name.endswith(".json"):
            return {path: set()}
        promised: dict[str, set[str]] = {}
        with _readable(path):
            for tensor, shard in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
                promised.setdefault(shard, set()).add(tensor)
        files = {shard: _find_file(source, shard) for shard in sorted(promised)}
        if lacking := [shard for shard, file in files.items() if file is None]:
            raise ModelError(f"{source}: {lacking[0]} is missing, which {name} names")
        return {file: promised[shard] for shard, file in files.items() if file is not None}
    raise ModelError(f"{source}: no weights found, neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}")


def _find_file(source: str, name: str) -> Path | None:
    """A file of a directory or hub id; from the local cache if the hub cannot be reached."""
    try:
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelError(f"{source}: {str(error).strip().splitlines()[0]}") from None
    return None if path is None else Path(path)


def is_pointer(path: Path) -> bool:
    """Whether the file is only git-LFS's pointer to it."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        if is_pointer(path):
            raise ValueError(f"it is {POINTER}")
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read: {reason}") from None


def is_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a weight of the model, not one of the buffers that older checkpoints store."""
    causal_mask = name.endswith((".attn.bias", ".attention.bias")) and tuple(shape[:2]) == (1, 1)
    return not causal_mask and _NOT_WEIGHTS.search(name) is None


def bare_name(name: str) -> str:
    """A tensor's name without its wrapping prefix (``model.``, ``vision_model.``)."""
    return ".".join(itertools.dropwhile(_WRAPPERS.__contains__, name.split(".")))


def sample_positions(num_elements: int) -> list[int]:
    """At most four rising positions in a flat tensor, a function of its size alone."""
    # Multiples of the golden ratio, modulo 1, spread evenly (Knuth's multiplicative hashing).
    fractions = [i * 2654435769 % 2**32 for i in range(1, 5)]
    return sorted({num_elements * fraction >> 32 for fraction in fractions} if num_elements else set())


def weights_fingerprint(source: str, *, vision: bool) -> dict[str, str]:
    """Samples a few values of every tensor of a checkpoint (directory or hub id), without loading the model.

    If it has several parts, only the vision part counts, or without ``vision`` the language part. Of
    safetensors only those values are read (0.15 s for 26 GB). The result is cached until a file changes.

    Returns ``"32x48 0.125 -0.5 ..."`` by the names in the files: the shape, ``1`` for a scalar, and up to
    four values in fp32, lossless with 9 digits.
    """
    stats = [(path, path.stat()) for path in _checkpoint_files(source)]
    whole = _sampled(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats))
    parts = VISION_PARTS if vision else LANGUAGE_PARTS
    inside = {name for name in whole if parts.intersection(name.split(".")[:3])}
    if inside and not vision:
        inside |= {name for name in whole if name.split(".")[-2:-1] == ["lm_head"]}
    return {name: text for name, text in whole.items() if not inside or name in inside}


@lru_cache(maxsize=8)
def _sampled(files: tuple[tuple[Path, int, int], ...]) -> dict[str, str]:
    """Samples the tensors of files, passed with their modification time in ns and size in bytes."""
    found = {}
    for path, _, _ in files:
        file = StoredFile(path)
        for name, stored in file.tensors.items():
            if is_weight(name, stored.shape):
                values = file.values(name, sample_positions(stored.num_elements))
                shape = "x".join(map(str, stored.shape)) or "1"
                found[name] = " ".join([shape, *(f"{value:.9g}" for value in values)])
    return found


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of the tensors in which two fingerprints differ, layer by layer.

    Tensors are matched by ``bare_name``. Those without a counterpart must agree one to one with tensors that
    lack one on the other side (they were renamed), or, if they are matrices, with any tensor there (they are
    tied and stored twice).

    Two values agree if they are at most one step apart in the coarsest format, of bf16, fp16 and fp32, that
    holds all values of one of the two tensors. So fp32 weights are compared as fp32, and as bf16 only if one
    side was converted to bf16. What fp16 cannot hold counts as 0 or infinity.
    """
    ours, theirs = _by_bare_name(wanted), _by_bare_name(found)
    changed = {}
    for key in ours.keys() & theirs.keys():
        name, (mine, other) = ours[key], (wanted[ours[key]], found[theirs[key]])
        shape, other_shape = mine.split()[0], other.split()[0]
        if shape != other_shape:
            changed[name] = f"{name} (shape {other_shape}, not {shape})"
        elif not _agree(mine, other):
            changed[name] = name
    unpaired = {theirs[key] for key in theirs.keys() - ours.keys()}
    for name in sorted((ours[key] for key in ours.keys() - theirs.keys()), key=_natural_key):
        twins = (other for other in sorted(unpaired, key=_natural_key) if _agree(wanted[name], found[other]))
        if (twin := next(twins, None)) is not None:
            unpaired.discard(twin)
        elif not _is_copy(wanted[name], found):
            changed[name] = f"{name} (missing)"
    for name in unpaired:
        if not _is_copy(found[name], wanted):
            changed.setdefault(name, f"{name} (added)")
    return [changed[name] for name in sorted(changed, key=_natural_key)]


def _is_copy(value: str, others: Mapping[str, str]) -> bool:
    """Whether the other side has a matrix with these values; not for vectors, many of which are equal."""
    return "x" in value.split()[0] and any(_agree(value, other) for other in others.values())


def _natural_key(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _by_bare_name(fingerprint: Mapping[str, str]) -> dict[str, str]:
    names = {bare_name(name): name for name in fingerprint}
    return names if len(names) == len(fingerprint) else {name: name for name in fingerprint}


def _agree(one: str, other: str) -> bool:
    """Whether two sampled tensors have the same shape and values that agree."""
    (shape, *values), (other_shape, *other_values) = one.split(), other.split()
    if one == other or shape != other_shape:
        return one == other
    a, b = (torch.tensor([float(v) for v in each], dtype=torch.float32) for each in (values, other_values))
    formats = [f for f in _FORMATS if torch.equal(a.to(f).float(), a) or torch.equal(b.to(f).float(), b)]
    a, b = a.double(), b.double()
    largest, infinite = torch.maximum(a.abs(), b.abs()), a.isinf() | b.isinf()
    same = (a == b) | (a.isnan() & b.isnan())
    same |= infinite & (a * b > 0) & (torch.minimum(a.abs(), b.abs()) >= torch.finfo(torch.float16).max)
    binade = 2.0 ** (torch.frexp(largest).exponent - 1)
    for info in map(torch.finfo, formats):
        same |= ~infinite & ((a - b).abs() <= binade.clamp(min=info.tiny) * info.eps)
    return bool(same.all())
