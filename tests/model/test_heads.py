"""A configuration that says tied over files with a head of its own, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import build_bases, save, trained_model
from tiny_checkpoints import save_bin
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dehvf_ds.export.__main__ import main as merge
from dehvf_ds.model import ModelError
from dehvf_ds.model.backbones import check_backbone, load_backbone_config, settle_head
from dehvf_ds.model.weights import build_config, check_bases, find_trained, load_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(llm: Path, change, *, tied: bool) -> None:
    path = llm / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, str]:
    """Says tied, and has a head of its own."""
    bases = build_bases(tmp_path)
    rewrite(tmp_path / "llm", lambda tensors: None, tied=True)
    return bases


def plain_logits(bases: dict[str, str], ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(bases["language_model"]).eval()(input_ids=ids).logits


def test_it_trains_and_exports_the_function_of_the_base(bases, tmp_path) -> None:
    ids = torch.randint(3, 200, (2, 6))
    expected = plain_logits(bases, ids)
    start = load_model(build_config(**bases, num_levels=2, rank=8), **bases, dtype=torch.float32).eval()
    assert torch.equal(start(input_ids=ids).logits, expected)
    model = trained_model(bases, task="caption", prompt="Picture:")
    save(model, bases, tmp_path / "run/adapter")
    trained = find_trained(tmp_path / "run").load("fp32")
    assert torch.equal(trained(input_ids=ids).logits, model(input_ids=ids).logits)
    for fold in ([], ["--no-fold"]):
        output = tmp_path / f"model{len(fold)}"
        assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(output), *fold]) == 0
        exported = AutoModelForImageTextToText.from_pretrained(output).eval()
        torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits)
        assert exported.get_output_embeddings().weight is not exported.get_input_embeddings().weight


def test_an_artifact_that_still_says_tied_is_exported_with_the_head(bases, tmp_path) -> None:
    """As artifacts of earlier versions do."""
    model = trained_model(bases, task="caption", prompt="Picture:")
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    save(model, bases, tmp_path / "run/adapter")
    assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    ids = torch.randint(3, 200, (2, 6))
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(exported(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_head_that_differs_in_one_value_is_one_of_its_own(tmp_path) -> None:
    bases = build_bases(tmp_path)

    def almost_the_embedding(tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][7, 3] += 1e-3

    rewrite(tmp_path / "llm", almost_the_embedding, tied=True)
    config = load_backbone_config(bases["language_model"], vision=False)
    settle_head(config, bases["language_model"])
    assert config.tie_word_embeddings is False
    check_backbone(bases["language_model"], config, vision=False)


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
    config = build_config(**bases, num_levels=2, rank=8)
    model = load_model(config, **bases, dtype=torch.float32)
    assert config.text_config.tie_word_embeddings is True
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_one_that_says_it_has_a_head_and_has_none_is_refused(tmp_path) -> None:
    bases = build_bases(tmp_path)
    save(trained_model(bases), bases, tmp_path / "run/adapter")
    rewrite(tmp_path / "llm", lambda tensors: tensors.pop(HEAD), tied=False)
    config = build_config(**bases, num_levels=2, rank=8)
    message = r"llm: the checkpoint lacks 1 weights, lm_head\.weight among them"
    with pytest.raises(ModelError, match=message):
        load_model(config, **bases, dtype=torch.float32)
    with pytest.raises(ModelError, match=message):
        check_bases(config, **bases)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        find_trained(tmp_path / "run")  # nor is it the base that was trained on
