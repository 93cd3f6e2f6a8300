from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import text_config, vision_config
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from dehvf_ds.model import ModelError
from dehvf_ds.model.backbones import load_backbone, load_backbone_config

SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def two_towers(kind: str) -> torch.nn.Module:
    text = {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, **SIZES}
    picture = {"image_size": 16, "patch_size": 4, **SIZES}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**text).to_dict(), vision_config=picture))
    return SiglipModel(
        SiglipConfig(
            text_config=SiglipTextConfig(**text).to_dict(),
            vision_config=SiglipVisionConfig(**picture).to_dict(),
        )
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_two_tower_checkpoint_the_vision_tower_is_taken(tmp_path: Path, kind: str) -> None:
    whole = two_towers(kind).eval()
    whole.save_pretrained(tmp_path)
    config = load_backbone_config(str(tmp_path), vision=True)
    tower = load_backbone(str(tmp_path), config, torch.float32, vision=True).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = whole.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected)


def test_a_tower_saved_alone_loads(tmp_path: Path) -> None:
    CLIPVisionModel(vision_config()).save_pretrained(tmp_path)
    config = load_backbone_config(str(tmp_path), vision=True)
    assert type(load_backbone(str(tmp_path), config, torch.float32, vision=True)) is CLIPVisionModel


def test_a_language_model_is_no_vision_tower(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a llama model has no patches"):
        load_backbone_config(str(tmp_path), vision=True)


@pytest.mark.parametrize("vision", [False, True])
def test_a_path_that_lies_elsewhere_is_named_with_its_remedy(tmp_path, monkeypatch, vision) -> None:
    monkeypatch.chdir(tmp_path)
    kind = "vision tower" if vision else "language model"
    with pytest.raises(
        ModelError, match=f"{kind} data/bases/one: no such directory in {tmp_path}; set"
    ) as found:
        load_backbone_config("data/bases/one", vision=vision)
    assert kind.replace(" ", "_") in str(found.value)
    with pytest.raises(ModelError, match="/nowhere: no such directory; set"):
        load_backbone_config("/nowhere", vision=vision)


def test_a_name_that_is_neither_a_hub_id_nor_a_directory_is_told_as_both(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"runs/llm: .*nor is there a directory {tmp_path}/runs/llm"):
        load_backbone_config("runs/llm", vision=False)
