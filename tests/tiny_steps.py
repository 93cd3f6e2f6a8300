"""Accumulation windows of made-up rows, and an engine of nothing but torch that steps over them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.step import StepResult, train_step


def rows(
    *lengths: int,
    pictures: int | None = None,
    width: int | None = None,
    side: int = 16,
    shared: bool = False,
) -> Batch:
    """A row for each length, padded on the right.

    The first ``pictures`` rows have one, or all of them; ``shared``: the same.
    """
    generator = torch.Generator().manual_seed(sum(lengths))
    size = (len(lengths), width or max(lengths))
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 60, size, generator=generator)
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, :2] = IGNORE_INDEX
    has_image = torch.arange(len(lengths)) < (len(lengths) if pictures is None else pictures)
    pixels = torch.randn(len(lengths), 3, side, side, generator=generator)
    return Batch(
        input_ids=ids * mask,
        attention_mask=mask,
        labels=labels,
        pixel_values=(pixels * has_image[:, None, None, None])[: 1 if shared else None],
        has_image=has_image,
        picture=torch.zeros(len(lengths), dtype=torch.long) if shared else None,
        keys=tuple(map(str, range(len(lengths)))),
    )


class PlainEngine:
    """Stands for DeepSpeed's engine, which waits where it likes; SGD steps after ``accumulation`` calls.

    ``during`` is entered at a window's first forward and left after its last step.
    """

    def __init__(
        self,
        model: DehvfForConditionalGeneration,
        accumulation: int,
        during: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self._during, self._calls, self._accumulation = model.train(), during, 0, accumulation
        self.entered = ExitStack()
        # AdamW counts its steps in a tensor on the CPU, and reads it.
        self._optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=1e-2)

    def __call__(self, **inputs: Any) -> Any:
        if self._calls % self._accumulation == 0:
            self.entered.enter_context(self._during())
        return self.model(**inputs)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        self._calls += 1
        if self._calls % self._accumulation == 0:
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.entered.close()


def take_step(engine: PlainEngine, window: list[Batch], device: str = "cpu", **more: Any) -> StepResult:
    """``train_step`` of a single rank."""
    world, dtype = World(0, 0, 1, 1, torch.device(device)), engine.model.dtype
    with engine.entered:
        return train_step(engine, window, world, dtype, **{"seed": 0, "step": 1} | more)
