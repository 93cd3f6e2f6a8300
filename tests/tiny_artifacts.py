"""Adapter artifacts over tiny backbones on disk, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import byte_tokenizer, text_config, vision_config
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil

from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.adapter import save_adapter
from dehvf_ds.model.backbones import build_config, load_model

# As many ids as the tokenizer knows, which has its end of text at 0.
DECODER = {"vocab_size": 260, "bos_token_id": None, "eos_token_id": 0}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["gate_proj", "down_proj"]}


def build_bases(root: Path, text: str = "llama", vision: str = "clip", **settings: Any) -> dict[str, str]:
    """A decoder with its tokenizer and a tower with its image processor, in ``root``.

    Args:
        root: directory for both.
        text: kind of the decoder.
        vision: kind of the tower.
        **settings: of the decoder's configuration.
    """
    torch.manual_seed(5)
    decoder = AutoModelForCausalLM.from_config(text_config(text, **(DECODER | settings)))
    for parameter in decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    decoder.save_pretrained(root / "llm")
    byte_tokenizer().save_pretrained(root / "llm")
    AutoModel.from_config(vision_config(vision)).save_pretrained(root / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "tower")
    return {"language_model": str(root / "llm"), "vision_tower": str(root / "tower")}


def trained_model(
    bases: dict[str, str], *, scale: float = 0.3, **settings: Any
) -> DehvfForConditionalGeneration:
    """A model over them, fp32, whose trainables have all left their start values by noise."""
    settings = {"num_feature_layers": 2, "rank": 8, "router_dim": 4, "lora": LORA} | settings
    model = load_model(build_config(**bases, **settings), **bases, dtype=torch.float32, seed=1).eval()
    torch.manual_seed(2)
    for parameter in model.trainable_parameters().values():
        parameter.data += scale * torch.randn_like(parameter)
    return model


def save(model: DehvfForConditionalGeneration, bases: dict[str, str], directory: Path) -> None:
    """Writes the model's artifact."""
    tensors = {name: p.data.clone() for name, p in model.trainable_parameters().items()}
    save_adapter(directory, tensors, model, **bases, dtype=torch.float32, info={"step": 7})
