from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LORA, build_model

from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.planning.activations import activation_peak_bytes, saved_bytes
from dehvf_ds.training.planning.shapes import Shapes, Work, count_shapes


def bytes_that_autograd_keeps(model: DehvfForConditionalGeneration, inputs: dict) -> int:
    """Bytes of the storages that a forward saves for its backward, each once, parameters left aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture
def zero3_linear(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts ZeRO-3's linear in the place of torch's, as DeepSpeed does for good."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return lambda: monkeypatch.setattr(F, "linear", zero3_linear_wrap)


@pytest.mark.parametrize("zero3", [False, True], ids=["plain", "zero3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": "ffn"},
        {"fusion": "none"},
        {"fusion": "prefix"},
        {"fusion": "ffn", "router": "last"},
        {"fusion": "ffn", "lora": LORA | {"targets": ["gate_proj", "up_proj", "down_proj"]}},
        {"fusion": "ffn", "lora": LORA | {"dropout": 0.1}},
    ],
    ids=["ffn", "none", "prefix", "last", "all-lora", "dropout"],
)
def test_the_formula_counts_what_autograd_keeps(
    settings: dict, dtype: torch.dtype, checkpointing: bool, zero3: bool, zero3_linear
) -> None:
    model = build_model(trained=True, **settings).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if zero3:
        zero3_linear()
    rows, tokens, prompt = 6, 24, 4
    input_ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 20:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :prompt] = -100
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.randn(rows, 3, 16, 16).to(dtype),
    }
    work = Work(
        rows=rows,
        tokens=tokens,
        supervised=rows * (tokens - prompt) - 4,
        element_bytes=dtype.itemsize,
        checkpointing=checkpointing,
        zero3_linear=zero3,
    )
    kept = bytes_that_autograd_keeps(model, inputs)
    shapes = count_shapes(model, 0)
    if shapes.lora_dropout and not checkpointing:
        # A CPU keeps the mask in the compute dtype, a GPU as the bytes that the formula counts.
        kept -= rows * tokens * sum(shapes.lora_inputs) * (work.element_bytes - 1) * shapes.layers
    assert saved_bytes(shapes, work) == pytest.approx(kept, rel=0.05)


def test_rows_of_one_length_need_no_mask() -> None:
    model = build_model(trained=True).train()
    input_ids = torch.randint(3, 64, (4, 40))
    kept = bytes_that_autograd_keeps(
        model, {"input_ids": input_ids, "labels": input_ids, "pixel_values": torch.randn(4, 3, 16, 16)}
    )
    work = Work(rows=4, tokens=40, supervised=4 * 39, element_bytes=4, padded=False, zero3_linear=False)
    shapes = count_shapes(model, 0)
    # Without a mask the heads share keys and values, which the formula does not know: an upper bound.
    assert kept < saved_bytes(shapes, work) < 1.15 * kept
    assert saved_bytes(shapes, replace(work, padded=True)) > saved_bytes(shapes, work)


def test_more_rows_and_tokens_need_more_and_recomputation_less(shapes: Shapes, work: Work) -> None:
    peak = activation_peak_bytes(shapes, work)
    assert activation_peak_bytes(shapes, replace(work, rows=17)) > peak
    assert activation_peak_bytes(shapes, replace(work, tokens=65)) > peak
    assert activation_peak_bytes(shapes, replace(work, supervised=1)) < peak
    assert activation_peak_bytes(shapes, replace(work, checkpointing=True)) < peak / 4
