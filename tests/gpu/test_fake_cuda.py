"""Device hygiene without a GPU: the model over tensors that only claim to lie on one.

A tensor made on the CPU in the middle of a pass, or one read by the host, is an error here. ``generate`` as a
whole asks the host after every token whether all rows have ended, so its parts are looked at.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from dehvf_ds.model import DehvfForConditionalGeneration

if torch.version.cuda is None:
    pytest.skip("a CPU build of torch has no fake CUDA tensors", allow_module_level=True)

ROWS, TOKENS = 3, 10


def on_fake_gpu(model: DehvfForConditionalGeneration) -> DehvfForConditionalGeneration:
    """In place, under a ``FakeTensorMode``: bf16 parameters, and buffers of their own dtype."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model


def fake_inputs() -> dict[str, Any]:
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device="cuda")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(ROWS, 3, 16, 16, dtype=torch.bfloat16, device="cuda"),
        "has_image": torch.ones(ROWS, dtype=torch.bool, device="cuda"),
    }


@pytest.fixture(params=["ffn", "prefix", "none"])
def model(request: pytest.FixtureRequest) -> DehvfForConditionalGeneration:
    return build_model(fusion=request.param)


@pytest.mark.parametrize("router", ["layer", "static", "last"])
def test_forward_stays_on_the_device(router: str) -> None:
    model = build_model(router=router)
    with FakeTensorMode(), torch.no_grad():
        out = on_fake_gpu(model)(**fake_inputs())
        assert out.logits.device.type == out.router_weights.device.type == "cuda"
        assert out.logits.shape == (ROWS, TOKENS, 64)


def test_the_loss_of_each_fusion_stays_on_the_device(model) -> None:
    # Shapes that only the device knew would be an error here, and a wait on a GPU.
    with FakeTensorMode(), torch.no_grad():
        given = fake_inputs()
        chosen = torch.zeros(5, dtype=torch.long, device="cuda")
        shared = {"picture": torch.zeros(ROWS, dtype=torch.long, device="cuda")}
        on_fake_gpu(model)
        for more in ({}, shared):
            out = model(**given, **more, labels=given["input_ids"], supervised=chosen)
            assert out.loss_sum.device.type == out.num_supervised.device.type == "cuda"
            assert out.loss_sum.dtype == torch.float32


def test_a_decoding_step_stays_on_the_device(model) -> None:
    with FakeTensorMode(), torch.no_grad():
        on_fake_gpu(model)
        given = fake_inputs()
        if model.config.fusion == "ffn":
            memory, _ = model.encode_images(given.pop("pixel_values"), given.pop("has_image"))
            given["visual_memory"] = model.prepare_memory(memory)
        cache = DynamicCache(config=model.config.text_config)
        first = model(**given, past_key_values=cache, use_cache=True)
        given.pop("pixel_values", None)
        mask = torch.ones(ROWS, first.logits.shape[1] + 1, dtype=torch.long, device="cuda")
        next_ids = first.logits[:, -1:].argmax(dim=-1)
        given |= {"input_ids": next_ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        assert model(**given, use_cache=True).logits.shape == (ROWS, 1, 64)
