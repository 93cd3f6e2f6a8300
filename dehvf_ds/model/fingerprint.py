"""Which base model a directory holds, told from its files alone; their tensors, read one at a time (ours).

The fingerprint of a checkpoint is the shape and four values of every tensor, at places that depend on its
size alone. Fine-tuning changes nearly all values of the matrices, so four of each tell models apart;
sharding, file format and prefixes of the names change nothing. A conversion between fp32, fp16 and bf16 moves
values by one rounding step, which ``differences`` allows.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

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

NUM_VALUES = 4
POINTER = "a git-LFS pointer in the file's place; run `git lfs pull` there"
_POINTER = b"version https://git-lfs"
# Module names that hold the wanted part of a checkpoint with several parts.
VISION_PARTS = {"vision_model", "vision_tower", "visual"}
LANGUAGE_PARTS = {"language_model", "text_model"}
# First words of a name that only say what the whole is wrapped in; versions of transformers differ in them.
_WRAPPERS = VISION_PARTS | LANGUAGE_PARTS | {"model", "transformer", "base_model", "gpt_neox"}
# Buffers that older checkpoints store, and layers that transformers does not load.
_NOT_WEIGHTS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked)$|^mtp\.")
# What reading damaged bytes raises.
_DAMAGED = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, TypeError, AttributeError),
)
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


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
    """One file of a checkpoint, safetensors or ``.bin``; damaged ones raise ``ModelError``.

    Of ``.bin`` files those that are zipped are mapped; older ones are held in memory, whole.

    Attributes:
        path: of the file.
        tensors: what it holds, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded: dict[str, Tensor] | None = None
        with _readable(path):
            if is_pointer(path):
                raise ValueError(f"it is {POINTER}")
            if path.suffix == ".safetensors":
                self.tensors = self._header()
                return
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except (pickle.UnpicklingError, KeyError):
                found = None
            if not isinstance(found, Mapping):
                raise ValueError("no file of tensors; save the model's state_dict, best as safetensors")
            self._loaded = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        self.tensors = {n: StoredTensor(tuple(t.shape), t.dtype) for n, t in self._loaded.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of what a ``.bin`` file holds; tensors that were read stay."""
        self._loaded = None

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that it is stored in."""
        if self._loaded is not None:
            return self._loaded[name]
        shape, dtype, start = self.tensors[name]
        (data,) = self._bytes([start], self.tensors[name].num_elements * dtype.itemsize)
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)

    def values(self, name: str, positions: Sequence[int]) -> list[float]:
        """Single values of a tensor, at flat positions, in fp32."""
        if self._loaded is not None:
            # By index, since a flat view of a transposed tensor would be a copy.
            tensor = self._loaded[name]
            places = torch.tensor(positions, dtype=torch.int64)
            found = tensor[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor[None]
        else:
            _, dtype, start = self.tensors[name]
            data = self._bytes([start + place * dtype.itemsize for place in positions], dtype.itemsize)
            found = torch.frombuffer(bytearray().join(data), dtype=dtype) if data else torch.empty(0)
        return found.to(torch.float32).tolist()

    def _header(self) -> dict[str, StoredTensor]:
        num_bytes = self.path.stat().st_size
        start = 8 + int.from_bytes(self._bytes([0], 8)[0], "little")
        if start > num_bytes:
            raise ValueError("it ends too early, within its header")
        entries = json.loads(self._bytes([8], start - 8)[0])
        entries.pop("__metadata__", None)
        end = start
        tensors = {}
        for name, entry in entries.items():
            if entry["dtype"] not in str_to_torch_dtype:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            dtype, (first, last) = str_to_torch_dtype[entry["dtype"]], entry["data_offsets"]
            tensors[name] = StoredTensor(tuple(entry["shape"]), dtype, start + first)
            end = max(end, start + last)
        if end > num_bytes:
            raise ValueError(f"it ends too early, after {num_bytes:,} of {end:,} bytes; copy it again")
        return tensors

    def _bytes(self, starts: Sequence[int], count: int) -> list[bytearray]:
        # Not by safe_open: it maps the file, and the system's reading ahead made four values cost all 26 GB.
        # The buffer is small for the same reason.
        pieces = []
        with _readable(self.path), io.BufferedReader(io.FileIO(self.path), 4096) as file:
            for start in starts:
                file.seek(start)
                pieces.append(bytearray(count))
                if file.readinto(pieces[-1]) < count:
                    raise ValueError("it ends too early")
        return pieces


def stored_tensors(source: str) -> dict[str, tuple[Path, StoredTensor]]:
    """File and entry of every tensor of a checkpoint (directory or hub id), by its files' headers."""
    places: dict[str, tuple[Path, StoredTensor]] = {}
    for path, promised in _checkpoint_files(source).items():
        with StoredFile(path) as file:
            if lacking := promised - file.tensors.keys():
                raise ModelError(f"{path}: lacks {min(lacking)}, which its index places there")
            places |= {name: (path, stored) for name, stored in file.tensors.items()}
    return places


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
            if is_pointer(path):
                raise ValueError(f"it is {POINTER}")
            for tensor, shard in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
                promised.setdefault(shard, set()).add(tensor)
        files = {shard: _find_file(source, shard) for shard in sorted(promised)}
        if lacking := [shard for shard, file in files.items() if file is None]:
            raise ModelError(f"{source}: {lacking[0]} is missing, which {name} names")
        return {file: promised[shard] for shard, file in files.items() if file is not None}
    raise ModelError(
        f"{source}: no weights found, neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}{gguf_hint(source)}"
    )


def _find_file(source: str, name: str) -> Path | None:
    """A file of a directory or hub id; a hub that cannot be reached is answered for by the local cache."""
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


def gguf_hint(source: str) -> str:
    """What to say of a model whose only files are llama.cpp's; empty without such files."""
    found = sorted(path.name for path in Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    return f"; {found[0]} is of llama.cpp: take the model that it was made of" if found else ""


def is_pointer(path: Path) -> bool:
    """Whether git left a pointer in the file's place."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read: {reason}") from None


def is_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether a checkpoint's tensor is a weight of the model, not a buffer that older checkpoints store."""
    causal_mask = name.endswith((".attn.bias", ".attention.bias")) and tuple(shape[:2]) == (1, 1)
    return not causal_mask and _NOT_WEIGHTS.search(name) is None


def bare_name(name: str) -> str:
    """A tensor's name without the words that only say what the whole is wrapped in."""
    return ".".join(itertools.dropwhile(_WRAPPERS.__contains__, name.split(".")))


def sample_positions(num_elements: int) -> list[int]:
    """At most ``NUM_VALUES`` rising places in a flat tensor, a function of its size alone.

    Multiples of the golden ratio, modulo 1, spread evenly (Knuth's multiplicative hashing).
    """
    fractions = [(i + 1) * 2654435769 % 2**32 for i in range(NUM_VALUES)]
    return sorted({num_elements * fraction >> 32 for fraction in fractions} if num_elements else set())


def weights_fingerprint(source: str, *, vision: bool) -> dict[str, str]:
    """Samples a few values of every tensor of a checkpoint, without loading the model.

    Of safetensors only those values are read (0.15 s for 26 GB); see ``StoredFile`` for ``.bin``. The result
    is kept for the process until a file changes.

    Args:
        source: directory or hub id, whose files are downloaded as ``from_pretrained`` would.
        vision: whether the tower is wanted: of a two-tower checkpoint the vision part alone, of a multimodal
            one the language part otherwise.

    Returns:
        By tensor name, as the files have it, ``"32x48 0.125 -0.5 ..."``: the shape, then up to four values in
        fp32, at 9 digits without loss. A scalar has the shape ``"1"``.
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
    """Samples the tensors of files, which are given with time of change in ns and size in bytes."""
    found = {}
    for path, _, _ in files:
        with StoredFile(path) as file:
            for name, stored in file.tensors.items():
                if is_weight(name, stored.shape):
                    values = file.values(name, sample_positions(stored.num_elements))
                    shape = "x".join(map(str, stored.shape)) or "1"
                    found[name] = " ".join([shape, *(f"{value:.9g}" for value in values)])
    return {name: found[name] for name in sorted(found, key=_natural_key)}


def _natural_key(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class _Sampled(NamedTuple):
    """One tensor of a fingerprint; ``formats`` are those of ``_FORMATS`` that hold all its values exactly."""

    name: str
    shape: str
    values: tuple[float, ...]
    formats: tuple[torch.dtype, ...]


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of the tensors in which two fingerprints differ, layer by layer.

    Tensors are paired by name without its wrapping prefix (``model.``, ``vision_model.``); those without a
    partner are paired where shape and values agree. A matrix that stands twice in one checkpoint, as a tied
    ``lm_head`` may, need not do so in the other.

    Two values agree when they are at most one step apart in the coarsest format, of bf16, fp16 and fp32, that
    holds all values of one of the two tensors. So fp32 weights are compared as fp32, and as bf16 only where
    one side has passed through bf16. What fp16 cannot hold counts as 0 or infinity.

    Returns:
        The names as in ``wanted``; with a word where the shape differs or one of the two lacks the tensor.
    """
    ours, theirs = _parse(wanted), _parse(found)
    changed = {}
    for key in ours.keys() & theirs.keys():
        mine, other = ours[key], theirs[key]
        if mine.shape != other.shape:
            changed[mine.name] = f"{mine.name} (shape {other.shape}, not {mine.shape})"
        elif not _agree(mine, other):
            changed[mine.name] = mine.name
    alone = {key: ours[key] for key in sorted(ours.keys() - theirs.keys(), key=_natural_key)}
    extra = {key: theirs[key] for key in sorted(theirs.keys() - ours.keys(), key=_natural_key)}
    for key, tensor in list(alone.items()):
        partner = next((k for k, other in extra.items() if _agree(tensor, other)), None)
        if partner is not None:
            del alone[key], extra[partner]
    for tensors, everything, word in ((alone, ours, "missing"), (extra, theirs, "added")):
        for key, tensor in tensors.items():
            if not _has_copy(key, tensor, everything):
                changed.setdefault(tensor.name, f"{tensor.name} ({word})")
    return [changed[name] for name in sorted(changed, key=_natural_key)]


def _parse(fingerprint: Mapping[str, str]) -> dict[str, _Sampled]:
    """A fingerprint's tensors by their names without wrapping prefixes."""
    keys = {name: bare_name(name) for name in fingerprint}
    if len(set(keys.values())) < len(keys):
        keys = {name: name for name in fingerprint}
    tensors = {}
    for name, text in fingerprint.items():
        shape, *numbers = text.split()
        values = torch.tensor([float(number) for number in numbers], dtype=torch.float32)
        formats = tuple(f for f in _FORMATS if torch.equal(values.to(f).float(), values))
        tensors[keys[name]] = _Sampled(name, shape, tuple(values.tolist()), formats)
    return tensors


def _agree(one: _Sampled, other: _Sampled) -> bool:
    if one.shape != other.shape:
        return False
    formats = set(one.formats + other.formats)
    return all(_same_value(a, b, formats) for a, b in zip(one.values, other.values, strict=True))


def _same_value(a: float, b: float, formats: set[torch.dtype]) -> bool:
    """Whether two values are at most one step of the coarsest of the formats apart."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    if math.isinf(a) or math.isinf(b):
        return a * b > 0 and min(abs(a), abs(b)) >= torch.finfo(torch.float16).max
    binade = 2.0 ** (math.frexp(max(abs(a), abs(b)))[1] - 1)
    infos = [torch.finfo(f) for f in formats]
    return any(abs(a - b) <= max(binade, info.tiny) * info.eps for info in infos)


def _has_copy(key: str, tensor: _Sampled, everything: Mapping[str, _Sampled]) -> bool:
    """Whether a matrix stands a second time in its checkpoint, as tied weights do."""
    return "x" in tensor.shape and any(
        other.shape == tensor.shape and other.values == tensor.values
        for k, other in everything.items()
        if k != key
    )
