"""An export as others load it: Auto classes, pipelines, other dtypes, several devices, no trainer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_artifacts import build_bases, save, trained_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from dehvf_ds.data.collate import load_tokenizer
from dehvf_ds.data.prompts import encode_chat_prompt
from dehvf_ds.export.__main__ import main as merge
from dehvf_ds.generate import main as generate
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import find_trained

PROMPT = "Caption of the picture:"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """``run/adapter``, merged in fp32 as ``model`` in several shards and ``one`` in one; ``picture.png``."""
    root = tmp_path_factory.mktemp("export")
    bases = build_bases(root)
    save(trained_model(bases, task="caption", prompt=PROMPT), bases, root / "run/adapter")
    for name, more in (("model", ["--max-shard-size", "100KB"]), ("one", []), ("apart", ["--no-fold"])):
        assert merge(["--checkpoint", str(root / "run"), "--output", str(root / name), *more]) == 0
    Image.radial_gradient("L").convert("RGB").resize((20, 30)).save(root / "picture.png")
    return root


def load(directory: Path, **settings):
    return AutoModelForImageTextToText.from_pretrained(directory, **settings).eval()


def ask(directory: Path, export: Path):
    """The processed question about the picture."""
    processor = AutoProcessor.from_pretrained(directory)
    return processor(images=Image.open(export / "picture.png"), text=PROMPT)


def said(export: Path) -> str:
    """The answer to it."""
    ids = load(export / "model").generate(**ask(export / "model", export), max_new_tokens=8)
    return AutoProcessor.from_pretrained(export / "model").batch_decode(ids, skip_special_tokens=True)[0]


@pytest.mark.parametrize("name", ["model", "apart"])
def test_it_answers_as_the_trained_model(export, name) -> None:
    inputs = ask(export / name, export)
    trained, exported = find_trained(export / "run").load(), load(export / name)
    torch.testing.assert_close(exported(**inputs).logits, trained(**inputs).logits, rtol=1e-5, atol=1e-5)
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "num_beams": beams, "eos_token_id": 0, "pad_token_id": 0}
        assert torch.equal(exported.generate(**inputs, **settings), trained.generate(**inputs, **settings))
    # Greedy and its ends come from the directory itself.
    assert exported.generation_config.max_new_tokens == 40
    assert exported.generation_config.eos_token_id == 0


def test_another_decoder_and_tower_say_the_same_as_trained_merged_and_saved_again(tmp_path) -> None:
    bases = build_bases(tmp_path, "qwen3", "dinov2")
    save(trained_model(bases, task="caption", prompt=PROMPT), bases, tmp_path / "run/adapter")
    assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    load(tmp_path / "model").save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    Image.radial_gradient("L").convert("RGB").resize((20, 30)).save(tmp_path / "picture.png")
    texts = set()
    for directory in ("run", "model", "again"):
        given = ["--model", str(tmp_path / directory), "--image", str(tmp_path / "picture.png")]
        output = tmp_path / f"{directory}.jsonl"
        assert generate([*given, "--output", str(output), "--max_new_tokens", "8"]) == 0
        texts.add(json.loads(output.read_text())["text"])
    assert len(texts) == 1


# No second device here: the disk stands for it, whose weights travel as another device's do.
SPLIT = {f"language_model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
SPLIT |= dict.fromkeys(("fuser", "reader", "vision_tower"), "disk") | {"projector": "cpu"}
DECODER_ENDS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
SPLIT |= {f"language_model.{name}": "cpu" for name in DECODER_ENDS}


@pytest.mark.parametrize(
    ("tolerance", "settings"),
    [
        (0.08, {"dtype": torch.bfloat16}),
        (1e-5, {"device_map": "auto"}),
        (1e-5, {"device_map": SPLIT}),
    ],
)
def test_in_other_dtypes_and_spread_over_devices(export, tmp_path, tolerance, settings) -> None:
    model, inputs = load(export / "model", offload_folder=tmp_path, **settings), ask(export / "model", export)
    expected = load(export / "model")(**inputs).logits
    found = model(**inputs.to(dtype=model.dtype)).logits
    assert found.dtype == settings.get("dtype", torch.float32)
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1


ALONE = """
import json, sys

# As on a machine without the trainer and most of what it needs.
sys.modules.update(dict.fromkeys(["dehvf_ds", "peft", "jaxtyping", "deepspeed", "webdataset"]))
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

directory, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
prompt = model.config.prompt
ids = model.generate(**processor(images=picture, text=prompt), max_new_tokens=8)
run = pipeline("image-text-to-text", model=directory, trust_remote_code=True)
settings = {"return_full_text": False, "max_new_tokens": 8}
several = run(images=[picture, picture], text=[prompt, prompt], **settings)
parts = [{"type": "image", "url": picture}, {"type": "text", "text": prompt}]
(chat,) = run(text=[{"role": "user", "content": parts}], **settings)
said = [answer["generated_text"] for answer in (*several, chat)]
print(json.dumps([*processor.batch_decode(ids, skip_special_tokens=True), *said]))
"""


@pytest.mark.slow
def test_it_loads_from_the_directory_alone(export) -> None:
    command = [sys.executable, "-c", ALONE, str(export / "model"), str(export / "picture.png")]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == [said(export)] * 4


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"


@pytest.mark.parametrize("own", [None, OWN])
def test_a_chat_is_written_as_in_training(tmp_path, own) -> None:
    bases = build_bases(tmp_path)
    tokenizer = load_tokenizer(bases["language_model"])
    tokenizer.chat_template = own
    tokenizer.save_pretrained(bases["language_model"])
    save(trained_model(bases, task="chat"), bases, tmp_path / "adapter")
    assert merge(["--checkpoint", str(tmp_path / "adapter"), "--output", str(tmp_path / "model")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    turns = [("user", "What is it?"), ("assistant", "A dog."), ("user", "Sure?")]
    plain = [{"role": role, "content": text} for role, text in turns]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    wanted = encode_chat_prompt(tokenizer, plain)
    for conversation in (plain, parts):
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        ids = processor.apply_chat_template(conversation, **settings)["input_ids"]
        assert ids.tolist() == [wanted]
        # In two steps, as many do.
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert processor(text=text)["input_ids"].tolist() == [wanted]
    # The trainer's own entries read the directory, too.
    assert encode_chat_prompt(load_tokenizer(str(tmp_path / "model")), plain) == wanted


def changed(export: Path, tmp_path: Path, change) -> Path:
    """A copy with other tensors and without the record of the files' sizes, as after somebody's own edits."""
    shutil.copytree(export, tmp_path / "copy")
    (tmp_path / "copy/export.json").unlink()
    tensors = load_file(export / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "copy"


HEAD, OUT = "language_model.lm_head.weight", "reader.w_out"


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("one", lambda t: t.pop(HEAD), r"lacks 1 weights, .*lm_head\.weight"),
        (
            "apart",
            lambda t: t.pop("language_model.model.layers.1.mlp.scale_in"),
            "lacks 1 weights, .*scale_in",
        ),
        ("one", lambda t: t.update({"fuser.w_kee": torch.ones(2)}), r"holds 1 weights, fuser\.w_kee among"),
        ("one", lambda t: t.update({OUT: torch.ones(2)}), r"reader\.w_out has shape .2., not"),
        ("one", lambda t: t[OUT].view(-1)[5:].fill_(torch.nan), r"w_out holds values .* not finite"),
    ],
)
def test_what_lacks_or_does_not_belong_is_named(export, tmp_path, form, change, message) -> None:
    with pytest.raises(ModelError, match=message):
        load(changed(export / form, tmp_path, change))


def test_it_is_refused_whichever_way_it_is_loaded(export, tmp_path) -> None:
    broken = changed(export / "one", tmp_path, lambda tensors: tensors.pop("projector.w_down"))
    ways = [
        lambda path: load(path, device_map="auto"),
        lambda path: load(path, ignore_mismatched_sizes=True),
        lambda path: DehvfForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16),
        lambda path: find_trained(path).load("fp32"),
    ]
    for way in ways:
        way(export / "one")
        with pytest.raises(ModelError, match=r"lacks 1 weights, projector\.w_down"):
            way(broken)
    # By the code beside the weights, too.
    name = json.loads((broken / "config.json").read_text())["auto_map"]["AutoConfig"]
    config = get_class_from_dynamic_module(name, str(broken)).from_pretrained(broken)
    alone = get_class_from_dynamic_module("modeling.DehvfForConditionalGeneration", str(broken))
    with pytest.raises(ValueError, match=r"lacks 1 weights, projector\.w_down"):
        alone.from_pretrained(broken, config=config)


def test_an_export_cut_short_is_named_before_it_loads(export, tmp_path) -> None:
    shutil.copytree(export / "one", tmp_path / "copy")
    with (tmp_path / "copy/model.safetensors").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"model\.safetensors: 1000 bytes, not \d+; copy it again"):
        find_trained(tmp_path / "copy").load()
