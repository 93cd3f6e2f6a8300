"""Nothing waits for the GPU within an accumulation window: CUDA itself says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from tiny_models import LORA, build_model
from tiny_steps import PlainEngine, rows, take_step

from dehvf_ds.training.engine import compile_units


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CASES = [
    *product(["ffn", "prefix", "none"], ["kept", "recomputed"], [(3, False), (1, False), (2, True)]),
    ("ffn", "compiled", (2, True)),
]


@pytest.mark.parametrize(("fusion", "way", "shown"), CASES)
def test_nothing_waits_within_a_window(device: str, fusion: str, way: str, shown: tuple[int, bool]) -> None:
    if device == "cpu":
        pytest.skip("tests/training/test_step.py looks at the operations")
    model = build_model(fusion=fusion, trained=True, lora=LORA | {"dropout": 0.1})
    if way == "recomputed":
        model.recompute_layers()
    if way == "compiled":
        compile_units(model)
    model = model.to("cuda", torch.bfloat16)
    more = {"pictures": shown[0], "shared": shown[1]}
    window = [rows(9, 5, 7, **more), rows(4, 8, 6, **more)]
    window = [batch.with_facts().pin_memory() for batch in window]
    # Libraries choose and load kernels at the first call.
    take_step(PlainEngine(model, 2), window, device)
    result = take_step(PlainEngine(model, 2, waits_are_errors), window, device)
    assert 0 < result.loss < 100


def test_a_wait_is_an_error(device: str) -> None:
    if device == "cpu":
        pytest.skip("no GPU to wait for")
    with pytest.raises(RuntimeError, match="synchronizing"), waits_are_errors():
        torch.ones(3, device="cuda").sum().item()
