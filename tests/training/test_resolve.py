"""Backbones that a run cannot use are refused in one line before it starts, by a dry run too."""

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

from dehvf_ds.config import UserError, parse_run_config, to_plain
from dehvf_ds.distributed import read_world
from dehvf_ds.model import ModelError
from dehvf_ds.model.backbones import load_backbone, load_backbone_config
from dehvf_ds.training import run_dir
from dehvf_ds.training.checkpoint import Checkpoint, Progress
from dehvf_ds.training.resolve import resolve

UP = "model.layers.1.mlp.up_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


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


def change_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def change_config(directory: Path, **values) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sharded(bases: Path) -> list[Path]:
    """Stores the decoder in several files; returns them."""
    (bases / "llm/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bases / "llm"))
    model.save_pretrained(bases / "llm", max_shard_size="60KB")
    return sorted((bases / "llm").glob("model-*.safetensors"))


def as_bin(bases: Path, content=None) -> Path:
    """Stores the decoder, or something else, as a .bin file."""
    path = bases / "llm/model.safetensors"
    torch.save(load_file(path) if content is None else content, path.with_name("pytorch_model.bin"))
    path.unlink()
    return path.with_name("pytorch_model.bin")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def add_tokens(bases: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(bases / "llm")


def other_model(bases: Path) -> None:
    config = text_config(vocab_size=2000, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(bases / "llm")


def without_end_of_text(bases: Path) -> None:
    core = build_tokenizer("byte_bpe", bases / "other").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(bases / "llm")


def picture_size(bases: Path) -> None:
    size = {"height": 18, "width": 18}
    CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=size).save_pretrained(bases / "tower")


def more_tower_layers(tensors) -> None:
    (name,) = [n for n in tensors if n.endswith("layers.3.mlp.fc1.weight")]
    tensors[name.replace("layers.3", "layers.4")] = tensors[name]


def in_eight_bits(tensors) -> None:
    name = next(name for name in tensors if "layers.0" in name and name.endswith("q_proj.weight"))
    tensors[name] = (tensors[name] * 10).to(torch.float8_e4m3fn)


ADAPTER = json.dumps(
    {"peft_type": "LORA", "base_model_name_or_path": "somewhere", "target_modules": ["q_proj"]}
)
FILES = [
    (lambda b: (b / "llm/model.safetensors").write_bytes(POINTER), "llm.*cannot be read: it is a git-LFS"),
    (lambda b: cut(b / "tower/model.safetensors", -10), "tower.*it ends too early, after .* bytes"),
    (lambda b: cut(b / "llm/model.safetensors", 40), "it ends too early, within its header"),
    (lambda b: (b / "tower/model.safetensors").unlink(), "tower.*no weights found"),
    (lambda b: sharded(b)[1].unlink(), "model-00002-of-.* is missing, which .*index.json names"),
    (lambda b: cut(sharded(b)[-1], -9), "ends too early"),
    (lambda b: shutil.copy(*sharded(b)[:2]), "model-00002-of-.*: lacks .*index places there"),
    (lambda b: cut(as_bin(b), -2000), r"pytorch_model\.bin: cannot be read"),
    (lambda b: as_bin(b).write_bytes(POINTER), "pytorch_model.*git-LFS pointer"),
    (lambda b: as_bin(b, torch.nn.Linear(2, 2)), r"pytorch_model\.bin: cannot be read: "),
    (lambda b: (b / "llm/generation_config.json").write_bytes(b"[]"), r"config\.json: not a JSON object"),
    (lambda b: (b / "llm/tokenizer.json").write_bytes(POINTER), "no tokenizer at .*run `git lfs pull`"),
    (lambda b: (b / "llm/adapter_config.json").write_text(ADAPTER), "llm: holds .*a PEFT adapter that"),
    (lambda b: (b / "tower/adapter_config.json").write_text(ADAPTER), "tower: holds .*a PEFT adapter that"),
]
WEIGHTS = [
    ("llm", lambda t: t.pop(UP), f"lacks 1 weights, {UP}"),
    ("llm", lambda t: t.update({UP: t[UP][:5]}), rf"{UP} has shape \[5, 48\], not \[96, 48\]"),
    ("llm", lambda t: t.update({UP.replace("1", "2"): t[UP]}), "has no place for"),
    ("llm", lambda t: t.update({"lm_head.bias": torch.ones(260)}), r"lm_head\.bias .*has no place for"),
    ("tower", more_tower_layers, r"tower.*layers\.4.*has no place for"),
    ("llm", in_eight_bits, "llm: .*q_proj.weight is stored as .*: its weights are quantised"),
    ("tower", in_eight_bits, "tower: .*q_proj.weight is stored as .*: its weights are quantised"),
]
CONFIGS = [
    *(
        (part, {"quantization_config": {"quant_method": method, "bits": 4}}, rf"quantised \({method}\)")
        for part, method in (("llm", "gptq"), ("llm", "bitsandbytes"), ("tower", "fp8"))
    ),
    ("llm", {"num_attention_heads": 0}, "/llm"),
    ("llm", {"hidden_size": "48"}, "/llm"),
    ("llm", {"rope_parameters": {"rope_type": "none such", "rope_theta": 1e4}}, "/llm"),
]
OTHERS = [
    (add_tokens, [], "its token '<extra8>' has id 265, but the language model has 260 embeddings"),
    (other_model, [], "knows 257 tokens, and the language model has 2000 embeddings"),
    (without_end_of_text, [], "no end-of-text token; set eos_token"),
    (picture_size, [], "18 is no multiple of the 4 pixels"),
    (bool, ["--model.image_size", "18"], "18 is no multiple of the 4 pixels .*tower; set it to 16 or 20"),
    (bool, ["--model.image_size", "3360"], r"3360 makes 840 patches .* a side .*; set it to 256 at most"),
]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        *((change, [], message) for change, message in FILES),
        *((lambda b, p=p, c=c: change_tensors(b / p, c), [], message) for p, c, message in WEIGHTS),
        *((lambda b, p=p, v=v: change_config(b / p, **v), [], message) for p, v, message in CONFIGS),
        *OTHERS,
    ],
)
def test_backbones_that_cannot_be_used_are_refused(world, bases, change, more, message) -> None:
    change(bases)
    refused(world, bases, message, *more)


def test_good_bases_pass(world, bases) -> None:
    # What other programs leave in a checkpoint is no fault.
    rest = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    change_tensors(bases / "llm", lambda t: t.update(rest | {"value_head.weight": torch.ones(1, 48)}))
    rest = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(3)}
    change_tensors(bases / "tower", lambda t: t.update(rest | {"embeddings.mask_token": torch.ones(1, 24)}))
    look(world, bases)
    as_bin(bases)
    look(world, bases)
    shutil.copy(world / "llm/model.safetensors", bases / "llm")
    (bases / "llm/pytorch_model.bin").unlink()
    assert len(sharded(bases)) > 2
    assert look(world, bases, "--model.image_size", "24").model_config.num_slots == 37


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llava", "a llava model is not a plain decoder"),
        ("gemma3", "a gemma3 model is not a plain decoder"),
        ("t5", "a t5 model is not a plain decoder"),
        ("clip", "a clip model is not a plain decoder"),
        ("bert", "is not a decoder whose layers each have an FFN named `mlp`"),
        ("dinov2", "a dinov2 model is not a plain decoder with an LM head"),
    ],
)
def test_what_is_no_decoder(world, bases, kind, message) -> None:
    sizes = {"num_hidden_layers": 1} if kind == "bert" else {}
    config = T5Config() if kind == "t5" else AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(bases / "llm")
    refused(world, bases, message)


def test_an_empty_instruction_is_one(world, bases) -> None:
    assert look(world, bases, "--data.prompt=").model_config.prompt == ""
    assert look(world, bases).model_config.prompt == "Caption of the picture:"


@pytest.mark.parametrize("vision", [False, True])
def test_values_that_are_not_finite_are_refused_when_loaded(world, bases, vision) -> None:
    source = bases / ("tower" if vision else "llm")
    config = load_backbone_config(str(source), vision=vision)
    load_backbone(str(source), config, torch.float32, vision=vision)

    def spoil(tensors) -> None:
        next(t for n, t in tensors.items() if n.endswith("q_proj.weight"))[0, 0] = float("inf")

    change_tensors(source, spoil)
    with pytest.raises(ModelError, match=r"q_proj.weight holds values that are not finite"):
        load_backbone(str(source), config, torch.float32, vision=vision)


SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}


@pytest.mark.parametrize(
    ("values", "more", "most"),
    [
        ({}, ["--model.fusion", "prefix"], 84),
        ({}, ["--model.fusion", "prefix", "--model.prefix_tokens", "4"], 96),
        ({"rope_parameters": SCALED}, [], 250),
        ({"rope_parameters": SCALED | {"rope_type": "dynamic", "factor": 0.5}}, [], 100),
    ],
)
def test_rows_longer_than_the_decoder_has_positions_for(world, bases, values, more, most) -> None:
    change_config(bases / "llm", max_position_embeddings=100, **values)
    message = f"data.max_tokens {most + 1} is more than .*llm has positions for; set it to {most} at most"
    refused(world, bases, message, *more, "--data.max_tokens", str(most + 1))
    look(world, bases, *more, "--data.max_tokens", str(most))


def test_captions_that_stay_together_need_several_a_picture(world, alone) -> None:
    together = ["--data.captions_together", "2"]
    assert resolve(parse_run_config(arguments(world, "together", *together)), read_world()).notes() == []
    problems = ["--data.task", "scienceqa", "--data.train", str(world / "scienceqa")]
    (note,) = resolve(parse_run_config(arguments(world, "alone", *together, *problems)), read_world()).notes()
    assert note.startswith("data.captions_together 2 has no effect: no row of ")


def test_a_setting_that_is_newer_than_a_checkpoint_had_its_default(world, monkeypatch) -> None:
    config = parse_run_config(arguments(world, "older"))
    before = to_plain(config)
    del before["data"]["captions_together"]
    kept = Checkpoint(Path("kept"), Progress(step=1), 1, before, "digest")
    monkeypatch.setattr(run_dir, "find_checkpoint", lambda *_: kept)
    monkeypatch.setattr(run_dir, "_check_backbones", lambda *_: None)
    assert run_dir.choose_start(config, "digest") is kept
    together = parse_run_config(arguments(world, "older", "--data.captions_together", "2"))
    with pytest.raises(UserError, match=r"data\.captions_together \(1 there, 2 now\)"):
        run_dir.choose_start(together, "digest")
