"""A model to decode with freely in the middle of a run: a whole copy where the engine's is partitioned.

Under ZeRO-3 the engine's model gathers every weight for every token, releases it after use, and needs all
ranks to walk the same road. A copy has none of DeepSpeed's hooks: ranks may decode texts of different length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfForConditionalGeneration

GATHERED_ELEMENTS = 100_000_000
"""Elements of weights that are gathered at a time, beside the copy."""


@contextmanager
def full_model(model: DehvfForConditionalGeneration, world: World) -> Iterator[DehvfForConditionalGeneration]:
    """The model in evaluation mode: itself where every rank holds all of it (ZeRO-2), else a whole copy.

    Every rank must enter it. At the end the model trains again, and the copy's memory is the device's.
    """
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        try:
            yield model.eval()
        finally:
            model.train()
            if model.config.fusion == "ffn":
                model.set_memory(None)
            _release_cache(world)
        return
    copy = full_copy(model, world)
    try:
        yield copy
    finally:
        # Whoever still holds it holds no weights.
        copy.to(device=torch.device("meta"))  # pyright: ignore[reportCallIssue]
        _release_cache(world)


@torch.no_grad()
def full_copy(model: DehvfForConditionalGeneration, world: World) -> DehvfForConditionalGeneration:
    """Copies the weights as they are now into a model without partitions. Every rank must call it.

    ``model`` is the one inside the engine, under any ZeRO stage; it is not changed. The copy is in evaluation
    mode, on this rank's device and in the engine's dtypes.
    """
    with torch.device("meta"):
        copy = DehvfForConditionalGeneration(model.config)
    names = dict(copy.named_parameters())
    sources = dict(model.named_parameters())
    assert names.keys() == sources.keys()
    for group in _groups(sources):
        with _gathered(list(group.values())):
            for name, source in group.items():
                whole = source.data.detach().to(world.device, copy=True)
                _put(copy, name, nn.Parameter(whole, requires_grad=False))
    for name, buffer in model.named_buffers():
        _put(copy, name, buffer.detach().clone())
    # What is shared was put once, under its first name.
    copy.tie_weights()
    copy.language_model.generation_config = model.language_model.generation_config
    return copy.eval()


def _release_cache(world: World) -> None:
    """Gives memory that decoding took back to the device."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _groups(sources: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in sources.items():
        if group and size + numel(parameter) > GATHERED_ELEMENTS:
            yield group
            group, size = {}, 0
        group[name] = parameter
        size += numel(parameter)
    yield group


def _gathered(parameters: list[nn.Parameter]):
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters if attribute in module._parameters else module._buffers
    held[attribute] = value  # pyright: ignore[reportArgumentType]


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())
