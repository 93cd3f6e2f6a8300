"""Backbones found and read strictly: of two towers, at a wrong path, with or without a head of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import build_bases, save, trained_model
from tiny_checkpoints import save_bin
from tiny_models import hub_snapshot, text_config, vision_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

from dehvf_ds.export.__main__ import main as merge
from dehvf_ds.model import ModelError
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.model.backbones import (
    build_config,
    check_bases,
    load_backbone,
    load_backbone_config,
    load_model,
    settle_head,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_two_tower_checkpoint_the_vision_tower_is_taken(tmp_path: Path, kind: str) -> None:
    words = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words |= {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    both, model = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    whole = model(both(text_config=words, vision_config=vision_config(kind).to_dict())).eval()
    whole.save_pretrained(tmp_path)
    config = load_backbone_config(str(tmp_path), vision=True)
    tower = load_backbone(str(tmp_path), config, torch.float32, vision=True).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = whole.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected)


def test_a_tower_saved_alone_loads_and_a_language_model_is_none(tmp_path: Path) -> None:
    CLIPVisionModel(vision_config()).save_pretrained(tmp_path / "tower")
    config = load_backbone_config(str(tmp_path / "tower"), vision=True)
    assert type(load_backbone(str(tmp_path / "tower"), config, torch.float32, vision=True)) is CLIPVisionModel
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelError, match="a llama model has no patches"):
        load_backbone_config(str(tmp_path / "llm"), vision=True)


def test_a_missing_directory_is_named_with_its_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="vision tower /nowhere: no such directory; set vision_tower"):
        load_backbone_config("/nowhere", vision=True)
    with pytest.raises(ModelError, match=rf"runs/llm: .*nor is there a directory {tmp_path}/runs/llm"):
        load_backbone_config("runs/llm", vision=False)  # or a hub id


def test_an_adapter_beside_the_weights_of_a_hub_id_is_refused(tmp_path, monkeypatch) -> None:
    snapshot = hub_snapshot(monkeypatch, tmp_path, "someone/llama")
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(snapshot)
    assert load_backbone_config("someone/llama", vision=False).model_type == "llama"
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ModelError, match=r"language model someone/llama: holds .*a PEFT adapter that"):
        load_backbone_config("someone/llama", vision=False)


def rewrite(llm: Path, change, *, tied: bool) -> None:
    path = llm / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.mark.parametrize("says_tied", [False, True])
def test_a_head_of_its_own_under_a_tied_configuration_is_trained_and_exported(tmp_path, says_tied) -> None:
    """The files decide; artifacts of earlier versions still say tied."""
    bases = build_bases(tmp_path)
    rewrite(tmp_path / "llm", lambda tensors: None, tied=True)
    ids = torch.randint(3, 200, (2, 6))
    expected = AutoModelForCausalLM.from_pretrained(bases["language_model"]).eval()(input_ids=ids).logits
    start = load_model(
        build_config(**bases, num_feature_layers=2, rank=8), **bases, dtype=torch.float32
    ).eval()
    assert torch.equal(start(input_ids=ids).logits, expected)
    model = trained_model(bases, task="caption", prompt="Picture:")
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = says_tied
    save(model, bases, tmp_path / "run/adapter")
    trained = find_trained(tmp_path / "run").load("fp32")
    assert torch.equal(trained(input_ids=ids).logits, model(input_ids=ids).logits)
    for fold in ([], ["--no-fold"]):
        output = tmp_path / f"model{len(fold)}"
        assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(output), *fold]) == 0
        exported = AutoModelForImageTextToText.from_pretrained(output).eval()
        torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits)
        assert exported.get_output_embeddings().weight is not exported.get_input_embeddings().weight


def test_a_head_that_differs_in_one_value_is_one_of_its_own(tmp_path) -> None:
    bases = build_bases(tmp_path)
    one_value = torch.zeros(260, 32).index_put((torch.tensor(7), torch.tensor(3)), torch.tensor(1e-3))
    rewrite(
        tmp_path / "llm", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + one_value}), tied=True
    )
    config = build_config(**bases, num_feature_layers=2, rank=8)
    settle_head(config, bases["language_model"])
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is False


@pytest.mark.parametrize("layout", ["absent", "copied", "bin"])
def test_a_head_that_is_the_embedding_stays_tied(tmp_path, layout) -> None:
    bases = build_bases(tmp_path)
    llm = tmp_path / "llm"
    if layout == "absent":
        rewrite(llm, lambda tensors: tensors.pop(HEAD), tied=True)
    else:
        rewrite(llm, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}), tied=True)
    if layout == "bin":
        # The names without the word that wraps them, as some hubs have it.
        tensors = {name.removeprefix("model."): t for name, t in load_file(llm / "model.safetensors").items()}
        save_bin(tensors, tmp_path / "bin")
        (tmp_path / "bin/pytorch_model.bin").rename(llm / "pytorch_model.bin")
        (llm / "model.safetensors").unlink()
    config = build_config(**bases, num_feature_layers=2, rank=8)
    model = load_model(config, **bases, dtype=torch.float32)
    assert config.text_config.tie_word_embeddings is True
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_without_its_head_is_refused(tmp_path) -> None:
    bases = build_bases(tmp_path)
    save(trained_model(bases), bases, tmp_path / "run/adapter")
    rewrite(tmp_path / "llm", lambda tensors: tensors.pop(HEAD), tied=False)
    config = build_config(**bases, num_feature_layers=2, rank=8)
    lacking = f"llm: the checkpoint lacks 1 weights, {HEAD} among them"
    with pytest.raises(ModelError, match=lacking):
        load_model(config, **bases, dtype=torch.float32)
    with pytest.raises(ModelError, match=lacking):
        check_bases(config, **bases)
    with pytest.raises(ModelError, match=HEAD):
        find_trained(tmp_path / "run")  # nor is it the base that was trained on
