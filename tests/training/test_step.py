"""One optimizer step: what the host may ask the device in it, and what it says of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LORA, build_model
from tiny_steps import PlainEngine, rows, take_step
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.item}


class NothingWaits(TorchDispatchMode):
    """Refuses what a host on a GPU waits for: values, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        masks = func._overloadpacket in (aten.index, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or func._overloadpacket in WAITING:
            raise AssertionError(f"the host would wait for the device: {func}")
        return func(*args, **(kwargs or {}))


WINDOWS = {
    "padded": [rows(9, 5, 7), rows(4, 8, 6)],
    "equal": [rows(6, 6, 6), rows(6, 6, 6)],
    "some pictures": [rows(9, 5, 7, pictures=2), rows(6, 6, 6, pictures=0)],
    "shared": [rows(9, 5, 7, shared=True), rows(6, 6, 6, pictures=2, shared=True)],
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("fusion", ["ffn", "prefix", "none"])
def test_nothing_waits_for_the_device_within_a_window(fusion: str, recomputed: bool, window: list) -> None:
    kind = "mistral" if fusion == "none" else "llama"
    model = build_model(kind, fusion=fusion, trained=True, lora=LORA | {"dropout": 0.1})
    if recomputed:
        model.recompute_layers()
    # On the CPU reading a batch is no wait: its facts come with it, from the loader's worker.
    window = [batch.with_facts() for batch in window]
    result = take_step(PlainEngine(model, len(window), NothingWaits), window, record_router=True)
    assert 0 < result.loss < 100
    assert (result.router_weights is None) == (fusion != "ffn")


def test_a_forward_that_is_told_nothing_asks() -> None:
    # So the test above can fail.
    model, batch = build_model(), rows(9, 5, 7).with_facts()
    with pytest.raises(AssertionError, match="would wait"), NothingWaits():
        model(**batch.inputs())


def test_a_step_counts_its_rows_and_takes_the_last_pictures_router() -> None:
    window = [rows(9, 5, 7, pictures=2), rows(6, 4, pictures=0)]
    model = build_model(trained=True)
    with torch.no_grad():
        expected = model(**window[0].inputs()).router_weights[:2].mean(dim=0)
    result = take_step(PlainEngine(model, 2), window, record_router=True)
    counts = result.counts
    assert (counts.num_rows, counts.num_pictures, counts.num_pictured_rows) == (5, 5, 2)
    assert (counts.num_text_tokens, counts.num_positions, counts.num_pairs) == (31, 39, 3 * 81 + 2 * 36)
    assert (counts.num_supervised, counts.num_unsupervised_rows) == (7 + 3 + 5 + 4 + 2, 0)
    assert result.padding_share == pytest.approx(8 / 39)
    torch.testing.assert_close(result.router_weights, expected)
    assert take_step(PlainEngine(model, 2), window).router_weights is None
