"""A decoder whose FFNs are mixtures of experts: trained without FFN adapters, exported, loaded."""

from __future__ import annotations

import pytest
import torch
from tiny_artifacts import build_bases, save, trained_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dehvf_ds.export.cli import main as merge
from dehvf_ds.model.trial import scaled_down


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_it_answers_as_the_trained_model(tmp_path, kind) -> None:
    bases = build_bases(tmp_path)
    config = AutoConfig.for_model(kind, vocab_size=260)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 0, None, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(scaled_down(config, num_layers=2)).save_pretrained(tmp_path / "llm")
    model = trained_model(bases, lora=None, task="caption", prompt="Picture:")
    save(model, bases, tmp_path / "run/adapter")
    assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    inputs = {"input_ids": torch.randint(3, 200, (2, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, expected)
    blind = model(input_ids=inputs["input_ids"]).logits
    assert not torch.allclose(blind, expected, atol=1e-3)
