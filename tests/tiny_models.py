"""Tiny backbones that tests build for themselves, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)

from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["down_proj"]}


def text_config(kind: str = "llama", **settings: Any) -> PreTrainedConfig:
    """A four-layer decoder of width 32."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | settings
    if kind == "qwen3":
        sizes |= {"head_dim": 8}
    return {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}[kind](**sizes)


def vision_config(kind: str = "clip") -> PreTrainedConfig:
    """A four-block tower of width 24 on 16 patches."""
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    if kind == "clip":
        return CLIPVisionConfig(**sizes, intermediate_size=48)
    if kind == "siglip":
        return SiglipVisionConfig(**sizes, intermediate_size=48)
    return Dinov2Config(**sizes)


def build_model(
    text: str = "llama", vision: str = "clip", *, seed: int = 0, trained: bool = False, **settings
) -> DehvfForConditionalGeneration:
    """A tiny model. ``trained`` moves every trainable off its start value, so that the branch acts."""
    settings = {"rank": 8, "router_dim": 4, "feature_layers": [1, 2, 4], "lora": LORA} | settings
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(
        DehvfConfig(text_config=text_config(text), vision_config=vision_config(vision), **settings)
    )
    if trained:
        for parameter in model.trainable_parameters().values():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *alphabet])}, merges=[]))
    core.add_special_tokens(["<eos>"])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def hub_snapshot(monkeypatch: pytest.MonkeyPatch, root: Path, repository: str) -> Path:
    """The folder of ``OWNER/NAME`` in a hub cache under ``root``, offline; its files are to be put there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory = root / "hub" / f"models--{repository.replace('/', '--')}"
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text("0" * 40)
    return directory / "snapshots" / ("0" * 40)
