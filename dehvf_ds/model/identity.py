"""Which base models an artifact was trained on: configuration fields and a sketch of the weights.

The sketch (ours) is computed from the checkpoint's files: of every tensor its shape and a few values at
places that depend on its size alone. So it stays the same under another sharding, ``.bin`` or safetensors,
and under another prefix of the names; a conversion between fp32, fp16 and bf16 changes values by one rounding
step, which the comparison allows. Fine-tuning changes nearly all values of the matrices, so four of each tell
the models apart.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .backbones import load_backbone_config
from .configuration import ModelError

NUM_VALUES = 4
# Fields of a backbone's configuration that say nothing about its weights.
_LOOSE_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}
# Module names that hold the wanted part of a checkpoint with several parts.
_VISION_PARTS = {"vision_model", "vision_tower", "visual"}
_LANGUAGE_PARTS = {"language_model", "text_model"}
# First words of a name that only say what the whole is wrapped in; versions of transformers differ in them.
_WRAPPERS = _VISION_PARTS | _LANGUAGE_PARTS | {"model", "transformer", "base_model", "gpt_neox"}
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
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def base_identity(source: str, *, vision: bool, weights: bool = True) -> dict[str, Any]:
    """What tells one base model from another.

    Args:
        source: directory or hub id.
        vision: whether it is the tower.
        weights: whether the weights are in use; without them there is no sketch.

    Returns:
        JSON values: ``path``; ``config``, the fields that shape the weights; ``sketch``, see
        ``sketch_weights``.

    Raises:
        ModelError: the configuration or the weights cannot be read.
    """
    identity: dict[str, Any] = {"path": source, "config": _config_fields(source, vision=vision)}
    if weights:
        identity["sketch"] = sketch_weights(source, vision=vision)
    return identity


def check_base(identity: Mapping[str, Any], source: str, *, vision: bool, owner: str) -> None:
    """Refuses a base model that is not the one of an identity.

    An identity without a sketch, from an artifact of format 1 or a run that did not use the weights, is
    compared by its configuration alone.

    Args:
        identity: what ``base_identity`` gave for the base that was trained on.
        source: directory or hub id of the base now.
        vision: whether it is the tower.
        owner: what was trained on it, for the message.

    Raises:
        ModelError: it is another model, or cannot be read.
    """
    found = _config_fields(source, vision=vision)
    differing = sorted(key for key, value in identity["config"].items() if found.get(key) != value)
    if differing:
        raise ModelError(
            f"{source} is not the {'vision tower' if vision else 'language model'} that {owner} was trained "
            f"on: {', '.join(differing)} differ"
        )
    if "sketch" not in identity:
        return
    names = differences(identity["sketch"], sketch_weights(source, vision=vision))
    if names:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ModelError(
            f"{owner} was trained on {identity['path']}; what is now in {source} differs from it in the "
            f"weights of {names[0]}{others}"
        )


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


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of the tensors in which two sketches differ.

    Tensors are paired by name without its wrapping prefix (``model.``, ``vision_model.``); those without a
    partner are paired where shape and values agree. A matrix that stands twice in one checkpoint, as a tied
    ``lm_head`` may, need not do so in the other.

    Two values agree when they are at most one step apart in the coarsest format, of bf16, fp16 and fp32, that
    holds all values of one of the two tensors. So fp32 weights are compared as fp32, and as bf16 only where
    one side has passed through bf16. What fp16 cannot hold counts as 0 or infinity.

    Args:
        wanted: a sketch.
        found: another one.

    Returns:
        The names as in ``wanted``, layer by layer; with a word where the shape differs or one of the two
        lacks the tensor.
    """
    ours, theirs = _parse(wanted), _parse(found)
    changed = {}
    for key in ours.keys() & theirs.keys():
        mine, other = ours[key], theirs[key]
        if mine.shape != other.shape:
            changed[mine.name] = f"{mine.name} (shape {other.shape}, not {mine.shape})"
        elif not _agree(mine, other):
            changed[mine.name] = mine.name
    alone = {key: ours[key] for key in sorted(ours.keys() - theirs.keys(), key=_natural)}
    extra = {key: theirs[key] for key in sorted(theirs.keys() - ours.keys(), key=_natural)}
    for key, tensor in list(alone.items()):
        partner = next((k for k, other in extra.items() if _agree(tensor, other)), None)
        if partner is not None:
            del alone[key], extra[partner]
    for tensor in _without_copies(alone, ours):
        changed[tensor.name] = f"{tensor.name} (missing)"
    for tensor in _without_copies(extra, theirs):
        changed.setdefault(tensor.name, f"{tensor.name} (added)")
    return [changed[name] for name in sorted(changed, key=_natural)]


class _Sampled(NamedTuple):
    """One tensor of a sketch; ``formats`` are those of ``_FORMATS`` that hold all its values exactly."""

    name: str
    shape: str
    values: tuple[float, ...]
    formats: tuple[torch.dtype, ...]


def _parse(sketch: Mapping[str, str]) -> dict[str, _Sampled]:
    """A sketch's tensors by their names without wrapping prefixes."""
    keys = {name: _bare_name(name) for name in sketch}
    if len(set(keys.values())) < len(keys):
        keys = {name: name for name in sketch}
    tensors = {}
    for name, text in sketch.items():
        shape, *numbers = text.split()
        values = torch.tensor([float(number) for number in numbers], dtype=torch.float32)
        formats = tuple(f for f in _FORMATS if torch.equal(values.to(f).float(), values))
        tensors[keys[name]] = _Sampled(name, shape, tuple(values.tolist()), formats)
    return tensors


def _bare_name(name: str) -> str:
    return ".".join(itertools.dropwhile(_WRAPPERS.__contains__, name.split(".")))


def _natural(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


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


def _without_copies(alone: Mapping[str, _Sampled], all_of_it: Mapping[str, _Sampled]) -> list[_Sampled]:
    """Leaves out matrices that stand a second time in the same checkpoint: tied weights."""

    def has_copy(key: str, tensor: _Sampled) -> bool:
        return "x" in tensor.shape and any(
            other.shape == tensor.shape and other.values == tensor.values
            for k, other in all_of_it.items()
            if k != key
        )

    return [tensor for key, tensor in alone.items() if not has_copy(key, tensor)]


def _config_fields(source: str, *, vision: bool) -> dict[str, Any]:
    config = json.loads(load_backbone_config(source, vision=vision).to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in _LOOSE_FIELDS}


def _select_part(sketch: Mapping[str, str], *, vision: bool) -> dict[str, str]:
    """The tower or the decoder of a checkpoint; all of it where it has no such parts."""
    parts = _VISION_PARTS if vision else _LANGUAGE_PARTS
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
    return {name: sketch[name] for name in sorted(sketch, key=_natural)}


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
