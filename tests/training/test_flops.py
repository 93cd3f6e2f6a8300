from __future__ import annotations

import pytest
from tiny_models import LORA
from transformers import CLIPVisionConfig, LlamaConfig

from dehvf_ds.model import DehvfConfig
from dehvf_ds.planning.memory import build_on_meta, full_batch, run_micro_step
from dehvf_ds.training.flops import count_flops

TEXT = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=1000,
)
VISION = CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)


def config_of(**settings) -> DehvfConfig:
    return DehvfConfig(text_config=TEXT, vision_config=VISION, **{"rank": 32, "lora": LORA} | settings)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": None}, {"router": "last"}, {"fusion": "none"}, {"fusion": "prefix", "prefix_tokens": 49}],
    ids=["ffn", "no-lora", "last", "none", "prefix"],
)
@pytest.mark.parametrize(("num_rows", "tokens"), [(4, 24), (2, 400)])
def test_hardware_flops_are_those_of_a_real_steps_products(
    settings: dict, recomputed: bool, num_rows: int, tokens: int
) -> None:
    model = build_on_meta(config_of(**settings), checkpointing=recomputed)
    batch = full_batch(model.config, num_rows, tokens)
    real = run_micro_step(model, batch, zero3=False).flops
    assert count_flops(model).hardware(batch.count()) == pytest.approx(real, rel=2e-3)


def test_partitioned_weights_count_whole() -> None:
    model = build_on_meta(config_of())
    expected = count_flops(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        # As ZeRO-3 leaves it.
        parameter.data = parameter.data.new_empty(0)
    assert count_flops(model) == expected


def test_flops_by_hand() -> None:
    """Text only, without adapters: 100 positions in 10 rows of 10, of which 60 are text and 30 supervised."""
    model = build_on_meta(config_of(fusion="none", lora=None))
    layer = 576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    decoder = 3 * layer + 2 * 1000 * 576 + 576
    found = count_flops(model)
    assert found.decoder == decoder
    assert found.model(60) == 4 * decoder * 60
    counts = full_batch(model.config, 10, 10).count()._replace(num_text_tokens=60, num_supervised=30)
    # Without a gradient through the first layer; attention forward 4, backward 10, for each pair and dim.
    layers = 100 * layer * (2 * 3 + 2 * 2)
    attention = 10 * 100 * 576 * (4 * 3 + 10 * 2)
    head = 30 * 1000 * 576 * 4
    assert found.hardware(counts) == layers + attention + head
