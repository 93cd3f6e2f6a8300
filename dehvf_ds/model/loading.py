"""Refuses a loaded model that is not what its files should hold: transformers itself only warns (ours)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .configuration import ModelError
from .sketch import is_weight


def refuse_incomplete(model: nn.Module, info: Mapping[str, Any], source: str) -> None:
    """Refuses a model whose weights did not all come from its files, or that left some of them.

    Args:
        model: loaded.
        info: what ``from_pretrained`` tells with ``output_loading_info``.
        source: directory or hub id, for the message.

    Raises:
        ModelError: weights are missing, unexpected, of another shape or not finite.
    """
    not_saved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    refuse_missing(set(info["missing_keys"]) - not_saved, source)
    refuse_mismatched(info, source)
    unexpected = [name for name in info["unexpected_keys"] if is_weight(name, ())]
    if unexpected:
        raise ModelError(f"{source}: holds {_named(unexpected)}, which the model of its config.json lacks")
    refuse_not_finite(model.named_parameters(), source)


def refuse_missing(names: Collection[str], source: str) -> None:
    """Refuses a checkpoint that lacks weights: what stands in their place is not theirs.

    Raises:
        ModelError: there are some.
    """
    if names:
        raise ModelError(f"{source}: the checkpoint lacks {_named(names)}")


def refuse_mismatched(info: Mapping[str, Any], source: str) -> None:
    """Refuses weights of another shape than the model's.

    Raises:
        ModelError: there are some.
    """
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"{source}: {name} has shape {list(found)}, not {list(wanted)}")


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuses infinite values and those that are no numbers; weights that lie elsewhere are left out.

    Raises:
        ModelError: a tensor holds some.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise ModelError(f"{source}: {name} holds values that are not finite")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; True for a tensor without values at hand."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return True
    # The extremes are finite unless a value is not: one pass, without a mask as large as the tensor.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.detach().aminmax())


def _named(names: Collection[str]) -> str:
    return f"{len(names)} weights, {min(names)} among them"
