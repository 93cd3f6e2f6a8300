"""Which base models an artifact was trained on: configuration fields and a sketch of the weights.

Sketches, see ``sketch.py``, are compared (ours) so that a base model stays the same under another prefix of
the names; a conversion between fp32, fp16 and bf16 changes values by one rounding step, which is allowed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .backbones import load_backbone_config
from .configuration import ModelError
from .sketch import bare_name, natural_key, sketch_weights

# Fields of a backbone's configuration that say nothing about its weights.
_LOOSE_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}
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

    An identity without a sketch, from a run that did not use the weights, is compared by its configuration
    alone.

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
    alone = {key: ours[key] for key in sorted(ours.keys() - theirs.keys(), key=natural_key)}
    extra = {key: theirs[key] for key in sorted(theirs.keys() - ours.keys(), key=natural_key)}
    for key, tensor in list(alone.items()):
        partner = next((k for k, other in extra.items() if _agree(tensor, other)), None)
        if partner is not None:
            del alone[key], extra[partner]
    for tensor in _without_copies(alone, ours):
        changed[tensor.name] = f"{tensor.name} (missing)"
    for tensor in _without_copies(extra, theirs):
        changed.setdefault(tensor.name, f"{tensor.name} (added)")
    return [changed[name] for name in sorted(changed, key=natural_key)]


class _Sampled(NamedTuple):
    """One tensor of a sketch; ``formats`` are those of ``_FORMATS`` that hold all its values exactly."""

    name: str
    shape: str
    values: tuple[float, ...]
    formats: tuple[torch.dtype, ...]


def _parse(sketch: Mapping[str, str]) -> dict[str, _Sampled]:
    """A sketch's tensors by their names without wrapping prefixes."""
    keys = {name: bare_name(name) for name in sketch}
    if len(set(keys.values())) < len(keys):
        keys = {name: name for name in sketch}
    tensors = {}
    for name, text in sketch.items():
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
