"""Bases that a run cannot use are refused in one line before it starts, by a dry run too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_entries import arguments
from tiny_models import byte_tokenizer, text_config
from tiny_tokenizers import build_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    T5Config,
)

from dehvf_ds.config import UserError, parse_run_config
from dehvf_ds.distributed import read_world
from dehvf_ds.model import ModelError
from dehvf_ds.model.backbones import load_backbone, load_backbone_config
from dehvf_ds.training.resolve import resolve

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def bases(world: Path, tmp_path: Path) -> Path:
    """Copies of the tiny decoder and the tiny tower."""
    for name in ("llm", "tower"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def look(world: Path, bases: Path, *more: str):
    given = ["--model.language_model", str(bases / "llm"), "--model.vision_tower", str(bases / "tower")]
    return resolve(parse_run_config(arguments(world, "bases", *given, *more)), read_world())


def refused(world: Path, bases: Path, message: str, *more: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        look(world, bases, *more)
    assert "\n" not in str(found.value).strip()


def tensors_of(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def config_of(directory: Path, **values) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sharded(bases: Path) -> list[Path]:
    """The decoder anew, in several files; returns them."""
    (bases / "llm/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bases / "llm"))
    model.save_pretrained(bases / "llm", max_shard_size="60KB")
    shards = sorted((bases / "llm").glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def test_good_bases_pass(world, bases) -> None:
    look(world, bases)
    sharded(bases)
    look(world, bases)
    model = AutoModelForCausalLM.from_pretrained(bases / "llm")
    for path in (bases / "llm").glob("model*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), bases / "llm/pytorch_model.bin")
    look(world, bases)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


@pytest.mark.parametrize("part", ["llm", "tower"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(POINTER), "cannot be read: it is a git-LFS pointer"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-10]),
            "it ends too early, after .* bytes",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "it ends too early, within its header"),
        (lambda path: path.write_bytes(b""), "it ends too early"),
        (lambda path: path.unlink(), "no weights found"),
    ],
)
def test_a_damaged_file(world, bases, part, change, message) -> None:
    change(bases / part / "model.safetensors")
    refused(world, bases, f"{part}.*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[1].unlink(), "model-00002-of-.* is missing, which .*index.json names"),
        (lambda shards: shards[1].write_bytes(POINTER), "model-00002-of-.*git-LFS pointer"),
        (lambda shards: shards[-1].write_bytes(shards[-1].read_bytes()[:-9]), "ends too early"),
        (lambda shards: shutil.copy(shards[0], shards[1]), "model-00002-of-.*: lacks .*index places there"),
    ],
)
def test_a_damaged_shard(world, bases, change, message) -> None:
    change(sharded(bases))
    refused(world, bases, message)


def test_a_damaged_bin(world, bases) -> None:
    tensors = load_file(bases / "llm/model.safetensors")
    (bases / "llm/model.safetensors").unlink()
    path = bases / "llm/pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    refused(world, bases, r"pytorch_model\.bin: cannot be read")
    path.write_bytes(POINTER)
    refused(world, bases, "git-LFS pointer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"lacks 1 weights, {UP}"),
        (lambda t: t.update({UP: t[UP][:5]}), rf"{UP} has shape \[5, 48\], not \[96, 48\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), "has no place for"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP]}), "has no place for"),
        (lambda t: t.update({"lm_head.bias": torch.ones(260)}), r"lm_head\.bias .*has no place for"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration(world, bases, change, message) -> None:
    tensors_of(bases / "llm", change)
    refused(world, bases, message)


def test_what_other_programs_leave_in_a_checkpoint_is_no_fault(world, bases) -> None:
    def add(tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["value_head.weight"] = torch.ones(1, 48)

    tensors_of(bases / "llm", add)

    def add_to_tower(tensors) -> None:
        tensors["text_model.encoder.layers.0.mlp.fc1.weight"] = torch.ones(3)
        tensors["embeddings.mask_token"] = torch.ones(1, 24)

    tensors_of(bases / "tower", add_to_tower)
    look(world, bases)


def test_a_tower_whose_layers_lack_a_weight_or_have_more(world, bases) -> None:
    def more(tensors) -> None:
        (name,) = [n for n in tensors if n.endswith("layers.3.mlp.fc1.weight")]
        tensors[name.replace("layers.3", "layers.4")] = tensors[name]

    tensors_of(bases / "tower", more)
    refused(world, bases, r"tower.*layers\.4.*has no place for")


@pytest.mark.parametrize("part", ["llm", "tower"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4"])
def test_quantised_weights(world, bases, part, method) -> None:
    config_of(bases / part, quantization_config={"quant_method": method, "bits": 4})
    refused(world, bases, rf"its weights are quantised \({method}\); take the model that they were made of")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llava", "a llava model is no decoder"),
        ("qwen2_vl", "a qwen2_vl model is no decoder"),
        ("gemma3", "a gemma3 model is no decoder"),
        ("paligemma", "a paligemma model is no decoder"),
        ("t5", "a t5 model is no decoder"),
        ("bart", "a bart model is no decoder"),
        ("clip", "a clip model is no decoder"),
        ("bert", "is not a decoder whose layers each have an FFN named `mlp`"),
        ("opt", "is not a decoder whose layers each have an FFN"),
        ("dinov2", "a dinov2 model is no decoder with an LM head"),
    ],
)
def test_what_is_no_decoder(world, bases, kind, message) -> None:
    sizes = {"num_hidden_layers": 1} if kind in ("bert", "opt") else {}
    config = T5Config() if kind == "t5" else AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(bases / "llm")
    refused(world, bases, message)


def test_experts(world, bases) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        eos_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(bases / "llm")
    refused(world, bases, r"mixtures of experts.*set model\.lora\.rank 0")
    look(world, bases, "--model.lora.rank", "0")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            18,
            r"model\.image_size 18 is no multiple of the 4 pixels of a patch of .*tower; set it to 16 or 20",
        ),
        (
            3360,
            r"model\.image_size 3360 makes 840 patches of 4 pixels a side of .*tower; set it to 256 at most",
        ),
    ],
)
def test_pictures_of_half_patches_or_far_too_many(world, bases, size, message) -> None:
    refused(world, bases, message, "--model.image_size", str(size))


def test_pictures_of_another_size_than_the_towers(world, bases) -> None:
    assert look(world, bases, "--model.image_size", "24").model_config.num_slots == 37


def test_a_size_of_the_towers_own_processor_is_held_to_the_same(world, bases) -> None:
    size = {"height": 18, "width": 18}
    CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=size).save_pretrained(bases / "tower")
    refused(world, bases, "18 is no multiple of the 4 pixels")


def test_a_tokenizer_with_more_ids_than_embeddings(world, bases) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(bases / "llm")
    refused(world, bases, "its token '<extra8>' has id 265, but the language model has 260 embeddings")


@pytest.mark.parametrize("content", [POINTER, b"[]", b"{", b"\xff"])
def test_settings_of_generation_that_would_be_passed_over(world, bases, content) -> None:
    (bases / "llm/generation_config.json").write_bytes(content)
    refused(world, bases, r"llm/generation_config\.json: not a JSON object")


def test_a_tokenizer_that_git_left_a_pointer_to(world, bases) -> None:
    (bases / "llm/tokenizer.json").write_bytes(POINTER)
    refused(world, bases, "no tokenizer at .*llm: tokenizer.json is a git-LFS pointer.*run `git lfs pull`")


def test_a_tokenizer_of_another_model(world, bases) -> None:
    model = AutoModelForCausalLM.from_config(
        text_config(vocab_size=2000, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    )
    model.save_pretrained(bases / "llm")
    refused(world, bases, "knows 257 tokens, and the language model has 2000 embeddings")


def test_a_tokenizer_without_an_end_of_text(world, bases) -> None:
    core = build_tokenizer("byte_bpe", bases / "other").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(bases / "llm")
    refused(world, bases, "no end-of-text token; set eos_token")


def test_an_empty_instruction_is_one(world, bases) -> None:
    for given, kept in (("", ""), ("Picture:", "Picture:")):
        assert look(world, bases, f"--data.prompt={given}").model_config.prompt == kept
    assert look(world, bases).model_config.prompt == "Caption of the picture:"


@pytest.mark.parametrize("part", ["llm", "tower"])
def test_an_adapter_beside_the_model_is_not_loaded_with_it(world, bases, part) -> None:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(world / "llm"),
        "target_modules": ["q_proj"],
    }
    (bases / part / "adapter_config.json").write_text(json.dumps(settings))
    refused(world, bases, f"{part}: holds adapter_config.json, a PEFT adapter that would be loaded with it")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("part", ["llm", "tower"])
def test_weights_in_eight_bits_without_a_word_in_the_configuration(world, bases, part, dtype) -> None:
    def store(tensors) -> None:
        name = next(name for name in tensors if "layers.0" in name and name.endswith("q_proj.weight"))
        tensors[name] = (tensors[name] * 10).to(dtype)

    tensors_of(bases / part, store)
    refused(world, bases, f"{part}: .*q_proj.weight is stored as .*: its weights are quantised")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("vision", [False, True])
def test_values_that_are_not_finite_are_refused_when_loaded(world, bases, vision, value) -> None:
    source = bases / ("tower" if vision else "llm")

    def spoil(tensors) -> None:
        next(t for n, t in tensors.items() if n.endswith("q_proj.weight"))[0, 0] = value

    config = load_backbone_config(str(source), vision=vision)
    load_backbone(str(source), config, torch.float32, vision=vision)
    tensors_of(source, spoil)
    with pytest.raises(ModelError, match=r"q_proj.weight holds values that are not finite"):
        load_backbone(str(source), config, torch.float32, vision=vision)


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "48"},
        {"hidden_act": "none such"},
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 1e4}},
    ],
)
def test_values_of_a_configuration_that_transformers_cannot_use(world, bases, values) -> None:
    config_of(bases / "llm", **values)
    with pytest.raises(UserError, match=str(bases / "llm")):
        look(world, bases)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.nn.Linear(2, 2), "text"])
def test_a_bin_file_of_something_else(world, bases, content) -> None:
    (bases / "llm/model.safetensors").unlink()
    torch.save(content, bases / "llm/pytorch_model.bin")
    refused(world, bases, "pytorch_model.bin: cannot be read: ")


ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("values", "more", "most"),
    [
        ({}, [], 100),
        ({}, ["--model.fusion", "prefix"], 84),
        ({}, ["--model.fusion", "prefix", "--model.prefix_tokens", "4"], 96),
        ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.5}}, [], 250),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 0.5}}, [], 100),
    ],
)
def test_rows_longer_than_the_decoder_has_positions_for(world, bases, values, more, most) -> None:
    config_of(bases / "llm", max_position_embeddings=100, **values)
    message = f"data.max_tokens {most + 1} is more than .*llm has positions for; set it to {most} at most"
    refused(world, bases, message, *more, "--data.max_tokens", str(most + 1))
    look(world, bases, *more, "--data.max_tokens", str(most))
