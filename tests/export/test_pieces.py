"""What is exported, tensor by tensor, is the trained model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import LORA, build_bases, save, trained_model
from tiny_checkpoints import save_bin
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dehvf_ds.export.decoder import DecoderFiles
from dehvf_ds.export.pieces import Piece, build_skeleton
from dehvf_ds.export.shards import write_shards
from dehvf_ds.model import ModelError
from dehvf_ds.model.adapters import fold_lora
from dehvf_ds.model.weights import find_trained

BACKBONES = [("llama", "clip"), ("mistral", "siglip"), ("qwen3", "dinov2")]


def exported(directory: Path, *, dtype: torch.dtype | None = None, fold: bool = True) -> dict[str, Tensor]:
    """All tensors of an export by their names in the model."""
    skeleton = build_skeleton(find_trained(directory), dtype=dtype, fold=fold)
    pieces = skeleton.decoder_pieces()
    assert len({piece.name for piece in pieces}) == len(pieces)
    tensors = {piece.name: piece.read() for piece in pieces}
    assert not tensors.keys() & skeleton.small_tensors().keys()
    for piece in pieces:
        assert tensors[piece.name].shape == piece.shape
        assert tensors[piece.name].dtype == piece.dtype
    skeleton.files.close()
    return tensors | skeleton.small_tensors()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("text", "vision"), BACKBONES)
def test_every_tensor_is_the_folded_model_rounded_once(tmp_path, text, vision, tied) -> None:
    bases = build_bases(tmp_path, text, vision, tie_word_embeddings=tied)
    model = trained_model(bases)
    save(model, bases, tmp_path / "adapter")
    fold_lora(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = exported(tmp_path / "adapter", dtype=dtype)
        wanted = model.state_dict()
        if tied:
            del wanted["language_model.lm_head.weight"]
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("fusion", ["ffn", "prefix", "none"])
def test_unfolded_the_trained_tensors_stay_apart_at_full_precision(tmp_path, fusion) -> None:
    bases = build_bases(tmp_path)
    model = trained_model(bases, fusion=fusion)
    save(model, bases, tmp_path / "adapter")
    found = exported(tmp_path / "adapter", dtype=torch.bfloat16, fold=False)
    trained = model.trainable_parameters()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor if name in trained else tensor.to(torch.bfloat16)), name


def test_the_dtype_is_the_bases_own_and_the_base_may_be_stored_otherwise(tmp_path) -> None:
    bases = build_bases(tmp_path)
    model = trained_model(bases)
    save(model, bases, tmp_path / "adapter")
    whole = exported(tmp_path / "adapter")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    # The same decoder in fp16, as .bin in three shards, its names without the wrapping "model.".
    state = load_file(Path(bases["language_model"]) / "model.safetensors")
    bare = {name.removeprefix("model."): tensor.half() for name, tensor in state.items()}
    other = tmp_path / "half"
    save_bin(bare, other, shards=3)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((Path(bases["language_model"]) / name).read_bytes())
    trained = find_trained(tmp_path / "adapter", language_model=str(other))
    skeleton = build_skeleton(trained, dtype=None, fold=True)
    assert skeleton.dtype == torch.float16
    pieces = {piece.name: piece.read() for piece in skeleton.decoder_pieces()}
    untouched = "language_model.model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(pieces[untouched], whole[untouched].half())
    folded = "language_model.model.layers.1.mlp.ffn.down_proj.weight"
    torch.testing.assert_close(pieces[folded].float(), whole[folded], rtol=2e-3, atol=2e-3)


def damage(bases: dict[str, str], change) -> None:
    """Changes the tensors of the decoder's one file."""
    path = Path(bases["language_model"]) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), r"lacks 1 weights, model\.layers\.2\.mlp\.up_proj\.weight"),
        (lambda tensors: tensors.update({NAME: torch.empty(0, 32)}), "holds no values"),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(48, 31)}),
            r"has shape \[48, 31\], not",
        ),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(48, 32, dtype=torch.int8)}),
            r"is quantised \(int8\)",
        ),
    ],
)
def test_a_damaged_decoder_is_named(tmp_path, change, message) -> None:
    bases = build_bases(tmp_path)
    save(trained_model(bases), bases, tmp_path / "adapter")
    trained = find_trained(tmp_path / "adapter")
    damage(bases, change)
    with pytest.raises(ModelError, match=message):
        build_skeleton(trained, dtype=None, fold=True).decoder_pieces()


def test_a_decoder_file_that_ends_too_early_is_named(tmp_path) -> None:
    bases = build_bases(tmp_path)
    path = Path(bases["language_model"]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ModelError, match=r"model\.safetensors: cannot be read: it ends too early, after .*copy it"
    ):
        DecoderFiles.find(bases["language_model"])


def test_an_adapter_of_no_weight_is_an_error(tmp_path) -> None:
    bases = build_bases(tmp_path)
    save(trained_model(bases), bases, tmp_path / "adapter")
    skeleton = build_skeleton(find_trained(tmp_path / "adapter"), dtype=None, fold=True)
    lost = "base_model.model.model.layers.9.mlp.down_proj"
    skeleton.lora |= {f"{lost}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    with pytest.raises(ModelError, match=r"layers\.9\.mlp\.down_proj belongs to no weight"):
        skeleton.decoder_pieces()


def piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_shards_are_what_safetensors_reads_and_no_larger_than_asked(tmp_path) -> None:
    tensors = {
        "a": torch.randn(30, 10),
        "b": torch.randn(5, 10).bfloat16(),
        "c": torch.randn(7).half(),
        "d": torch.randn(200, 10),  # larger than a shard
        "e": torch.tensor(3.0),
        "f": torch.randn(4, 3).t(),
    }
    record = write_shards(tmp_path, [piece(n, t) for n, t in tensors.items()], "2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == record.keys()
    assert len(record) == 2
    for file, promised in record.items():
        path = tmp_path / file
        loaded = load_file(path)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in loaded.items())
        assert loaded.keys() == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(t.nbytes for t in loaded.values()) <= 2000 or len(loaded) == 1
        assert promised == {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


def test_one_shard_has_no_index(tmp_path) -> None:
    record = write_shards(tmp_path, [piece("a", torch.ones(3))], "5GB")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"} == record.keys()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "a: holds values that are not finite$"),
        (torch.tensor([1e6, 1.0]).half(), "a: holds values that are not finite; fp16 ends at 65504"),
        (torch.empty(0), "a: holds no values"),
    ],
)
def test_values_that_no_weight_has_are_named(tmp_path, tensor, message) -> None:
    with pytest.raises(ModelError, match=message):
        write_shards(tmp_path, [piece("a", tensor)], "5GB")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_transformers_renames_are_found(tmp_path, tied) -> None:
    bases = build_bases(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gpt_neox", **sizes, vocab_size=260, eos_token_id=0, tie_word_embeddings=tied
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    model = trained_model(bases, lora=LORA | {"targets": ["dense_4h_to_h"]})
    save(model, bases, tmp_path / "adapter")
    fold_lora(model)
    found = exported(tmp_path / "adapter", dtype=torch.float32)
    for name, tensor in found.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_tied_weight_may_stand_in_the_files_as_the_head_alone(tmp_path) -> None:
    bases = build_bases(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "llm/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    save(trained_model(bases), bases, tmp_path / "adapter")
    found = exported(tmp_path / "adapter")
    assert torch.equal(found["language_model.model.embed_tokens.weight"], tensors["lm_head.weight"])
