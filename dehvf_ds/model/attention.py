"""Attention masks of a training step, made without asking the device whether they hide anything (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_ASKING = "sdpa"
"""The implementation that is told. Flash kernels ask anyway, to leave padding out; the others never do."""


@contextmanager
def known_masks(implementation: str | None, *, masked: bool | None) -> Iterator[None]:
    """Tells transformers whether the 2-D attention mask hides any position; None lets it ask.

    Where it hides none, transformers builds no mask and relies on the kernel's causal flag, and to see that
    the host waits for the device. Told, it builds or leaves out the same masks.
    """
    if masked is None or implementation != _ASKING:
        yield
        return
    build: Callable[..., Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS[_ASKING]

    def build_known(
        *, allow_is_causal_skip: bool = True, local_size: int | None = None, **given: Any
    ) -> Tensor | None:
        # Windows shorter than the row, and patterns that are not causal alone, need their mask all the same.
        is_window = local_size is not None and given.get("kv_length", local_size) >= local_size
        if allow_is_causal_skip and not masked and not is_window:
            return None
        return build(allow_is_causal_skip=False, local_size=local_size, **given)

    # Local to the one instance: the library's own way of putting a function in another's place.
    ALL_MASK_ATTENTION_FUNCTIONS[_ASKING] = build_known
    try:
        yield
    finally:
        # Whatever was there before, another's function among it.
        ALL_MASK_ATTENTION_FUNCTIONS[_ASKING] = build
