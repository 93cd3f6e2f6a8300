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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dehvf_ds.export.__main__ import main as merge
from dehvf_ds.export.merge import MergedModel, TensorSpec, write_shards
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.model.ffn import fold_lora
from dehvf_ds.model.trial import scaled_down


def saved_model(root: Path, bases: dict[str, str], **settings) -> DehvfForConditionalGeneration:
    """A trained model over the bases, whose artifact lies in ``root/adapter``."""
    model = trained_model(bases, **settings)
    save(model, bases, root / "adapter")
    return model


def exported(
    root: Path, *, dtype: torch.dtype | None = None, fold: bool = True, **moved
) -> dict[str, Tensor]:
    """All tensors of an export by their names in the model."""
    merged = MergedModel(find_trained(root / "adapter", **moved), dtype=dtype, fold=fold)
    tensors = {name: tensor for name, tensor in merged.model.state_dict().items() if not tensor.is_meta}
    for name, like, read in merged.decoder_tensors():
        assert name not in tensors
        tensors[name] = read()
        assert (tensors[name].shape, tensors[name].dtype) == (like.shape, like.dtype)
    return tensors


@pytest.mark.parametrize(
    ("text", "vision", "tied"),
    [("llama", "clip", False), ("mistral", "siglip", True), ("qwen3", "dinov2", False)],
)
def test_every_tensor_is_the_folded_model_rounded_once(tmp_path, text, vision, tied) -> None:
    model = saved_model(tmp_path, build_bases(tmp_path, text, vision, tie_word_embeddings=tied))
    fold_lora(model)
    wanted = model.state_dict()
    if tied:
        del wanted["language_model.lm_head.weight"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = exported(tmp_path, dtype=dtype)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("fusion", ["ffn", "prefix", "none"])
def test_unfolded_the_trained_tensors_stay_apart_at_full_precision(tmp_path, fusion) -> None:
    model = saved_model(tmp_path, build_bases(tmp_path), fusion=fusion)
    found, trained = exported(tmp_path, dtype=torch.bfloat16, fold=False), model.trainable_parameters()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor if name in trained else tensor.to(torch.bfloat16)), name


def test_the_dtype_is_the_bases_own_and_the_base_may_be_stored_otherwise(tmp_path) -> None:
    llm = Path(build_bases(tmp_path)["language_model"])
    saved_model(tmp_path, {"language_model": str(llm), "vision_tower": str(tmp_path / "tower")})
    whole = exported(tmp_path)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    # The same decoder in fp16, as .bin in three shards, its names without the wrapping "model.".
    state = load_file(llm / "model.safetensors")
    save_bin({n.removeprefix("model."): t.half() for n, t in state.items()}, tmp_path / "half", shards=3)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((llm / name).read_bytes())
    half = exported(tmp_path, language_model=str(tmp_path / "half"))
    assert half.keys() == whole.keys()
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for name, tensor in half.items():
        if ".mlp.ffn." in name:  # rounded before the adapters were added, and after
            torch.testing.assert_close(tensor.float(), whole[name], rtol=2e-3, atol=2e-3)
        else:
            assert torch.equal(tensor, whole[name].half()), name


def test_weights_that_transformers_renames_are_found(tmp_path) -> None:
    bases = build_bases(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_neox", **sizes, vocab_size=260, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    model = saved_model(tmp_path, bases, lora=LORA | {"targets": ["dense_4h_to_h"]})
    fold_lora(model)
    for name, tensor in exported(tmp_path, dtype=torch.float32).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_a_mixture_of_experts_answers_as_the_trained_model(tmp_path, kind) -> None:
    bases = build_bases(tmp_path)
    config = AutoConfig.for_model(kind, vocab_size=260)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 0, None, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(scaled_down(config, num_layers=2)).save_pretrained(tmp_path / "llm")
    model = saved_model(tmp_path, bases, lora=None, task="caption", prompt="Picture:")
    assert merge(["--checkpoint", str(tmp_path / "adapter"), "--output", str(tmp_path / "model")]) == 0
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    inputs = {"input_ids": torch.randint(3, 200, (2, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, expected)
    assert not torch.allclose(model(input_ids=inputs["input_ids"]).logits, expected, atol=1e-3)


@pytest.mark.parametrize("changed", [None, torch.zeros(48, 32, dtype=torch.int8)], ids=["lacks", "quantised"])
def test_a_decoder_that_was_damaged_after_it_was_checked_is_named(tmp_path, changed) -> None:
    saved_model(tmp_path, build_bases(tmp_path))
    trained, name = find_trained(tmp_path / "adapter"), "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "llm/model.safetensors") | {name: changed}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"llm: no unquantised {name} of shape \[48, 32\] in the files"):
        MergedModel(trained, dtype=None, fold=True).decoder_tensors()


def spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.to("meta"), lambda: tensor)


def test_shards_are_what_safetensors_reads_and_no_larger_than_asked(tmp_path) -> None:
    tensors = {
        "a": torch.randn(30, 10),
        "b": torch.randn(5, 10).bfloat16(),
        "c": torch.randn(7).half(),
        "d": torch.randn(200, 10),  # larger than a shard
        "e": torch.tensor(3.0),
        "f": torch.randn(4, 3).t(),
    }
    assert write_shards(tmp_path, [spec("a", torch.ones(3))], "5GB").keys() == {"model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]  # one shard has no index
    record = write_shards(tmp_path, [spec(n, t) for n, t in tensors.items()], "2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == record.keys()
    assert len(record) == 2
    for file, promised in record.items():
        data, loaded = (tmp_path / file).read_bytes(), load_file(tmp_path / file)
        assert loaded.keys() == {name for name, place in index["weight_map"].items() if place == file}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in loaded.items())
        assert sum(t.nbytes for t in loaded.values()) <= 2000 or len(loaded) == 1
        assert promised == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "a: holds values that are not finite$"),
        (torch.tensor([1e6, 1.0]).half(), "a: holds values that are not finite; fp16 ends at 65504"),
        (torch.empty(0), "a: empty, or of another shape"),
    ],
)
def test_values_that_no_weight_has_are_named(tmp_path, tensor, message) -> None:
    with pytest.raises(ModelError, match=message):
        write_shards(tmp_path, [spec("a", tensor)], "5GB")
