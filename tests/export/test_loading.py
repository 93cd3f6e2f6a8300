"""An export as others load it: Auto classes, pipelines, other dtypes, several devices, no trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_artifacts import build_bases, save, trained_model
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from dehvf_ds.batch import Sample
from dehvf_ds.data.chat import encode_chat_prompt
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.export.cli import main as merge
from dehvf_ds.generate import main as generate
from dehvf_ds.model.weights import find_trained

PROMPT = "Caption of the picture:"


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """``run/adapter`` and its merged fp32 ``model``, in several shards; ``picture.png``."""
    root = tmp_path_factory.mktemp("export")
    bases = build_bases(root)
    save(trained_model(bases, task="caption", prompt=PROMPT), bases, root / "run/adapter")
    given = ["--checkpoint", str(root / "run"), "--output", str(root / "model")]
    assert merge([*given, "--max-shard-size", "100KB"]) == 0
    Image.radial_gradient("L").convert("RGB").resize((20, 30)).save(root / "picture.png")
    return root


def load(directory: Path, **settings):
    return AutoModelForImageTextToText.from_pretrained(directory, **settings).eval()


def ask(directory: Path, export: Path):
    """The processed question about the picture."""
    processor = AutoProcessor.from_pretrained(directory)
    return processor(images=Image.open(export / "picture.png"), text=PROMPT)


def test_it_answers_as_the_trained_model(export) -> None:
    inputs = ask(export / "model", export)
    trained, merged = find_trained(export / "run").load(), load(export / "model")
    torch.testing.assert_close(merged(**inputs).logits, trained(**inputs).logits, rtol=1e-5, atol=1e-5)
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "num_beams": beams, "eos_token_id": 0, "pad_token_id": 0}
        assert torch.equal(merged.generate(**inputs, **settings), trained.generate(**inputs, **settings))
    # Greedy and its ends come from the directory itself.
    assert merged.generation_config.max_new_tokens == 40
    assert merged.generation_config.eos_token_id == 0
    assert merged.generate(**inputs).shape[1] <= 40


@pytest.mark.parametrize(("text", "vision"), [("mistral", "siglip"), ("qwen3", "dinov2")])
def test_other_decoders_and_towers(tmp_path, text, vision) -> None:
    """Train, merge, load, ask, save, load again, ask by the command line."""
    bases = build_bases(tmp_path, text, vision)
    save(trained_model(bases, task="caption", prompt=PROMPT), bases, tmp_path / "run/adapter")
    assert merge(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    Image.radial_gradient("L").convert("RGB").resize((20, 30)).save(tmp_path / "picture.png")
    inputs = ask(tmp_path / "model", tmp_path)
    trained, merged = find_trained(tmp_path / "run").load(), load(tmp_path / "model")
    torch.testing.assert_close(merged(**inputs).logits, trained(**inputs).logits, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 8, "eos_token_id": 0, "pad_token_id": 0}
    ids = merged.generate(**inputs, **settings)
    assert torch.equal(ids, trained.generate(**inputs, **settings))
    merged.save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").generate(**inputs, **settings), ids)
    said = []
    for directory in ("run", "model", "again"):
        given = ["--model", str(tmp_path / directory), "--image", str(tmp_path / "picture.png")]
        output = tmp_path / f"{directory}.jsonl"
        assert generate([*given, "--output", str(output), "--max_new_tokens", "8"]) == 0
        said.append([json.loads(line)["text"] for line in output.read_text().splitlines()])
    assert said[0] == said[1] == said[2]


def test_without_a_picture_it_answers_otherwise(export) -> None:
    processor, model = AutoProcessor.from_pretrained(export / "model"), load(export / "model")
    picture = Image.open(export / "picture.png")
    both = processor(images=[picture, None], text=[PROMPT, PROMPT])
    assert both["has_image"].tolist() == [True, False]
    seen, blind = model(**both).logits
    torch.testing.assert_close(blind, model(**processor(text=PROMPT)).logits[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen, blind, atol=1e-3)


def test_saved_again_it_is_the_same_to_the_bit(export, tmp_path) -> None:
    model = load(export / "model")
    model.save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(export / "model").save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in ask(export / "model", export).items():
        assert torch.equal(ask(tmp_path / "again", export)[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(export, dtype) -> None:
    model = load(export / "model", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = ask(export / "model", export).to(dtype=dtype)
    logits = model(**inputs).logits.float()
    expected = load(export / "model")(**ask(export / "model", export)).logits
    assert (logits - expected).abs().max() < 0.08 * expected.abs().max()
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1


@pytest.mark.parametrize("device_map", ["auto", "split"])
def test_spread_over_devices(export, tmp_path, device_map) -> None:
    inputs = ask(export / "model", export)
    expected = load(export / "model")(**inputs).logits
    if device_map == "split":
        # No second device here: the disk stands for it, whose weights travel as another device's do.
        device_map = {f"language_model.model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        device_map |= {f"language_model.{name}": "cpu" for name in rest} | {"projector": "cpu"}
        device_map |= dict.fromkeys(("fuser", "reader", "vision_tower"), "disk")
    model = load(export / "model", device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1


def test_a_pipeline_of_pictures_texts_and_chats(export) -> None:
    run = pipeline("image-text-to-text", model=str(export / "model"))
    picture = str(export / "picture.png")
    settings = {"return_full_text": False, "max_new_tokens": 8}
    (one,) = run(images=picture, text=PROMPT, **settings)
    several = run(images=[picture, picture], text=[PROMPT, PROMPT], **settings)
    assert [answer["generated_text"] for answer in several] == [one["generated_text"]] * 2
    parts = [{"type": "image", "url": picture}, {"type": "text", "text": PROMPT}]
    (chat,) = run(text=[{"role": "user", "content": parts}], **settings)
    assert chat["generated_text"] == one["generated_text"]
    inputs = ask(export / "model", export)
    ids = load(export / "model").generate(**inputs, max_new_tokens=8)
    decoded = AutoProcessor.from_pretrained(export / "model").batch_decode(ids, skip_special_tokens=True)
    assert decoded == [one["generated_text"]]


@pytest.mark.slow
def test_it_loads_from_the_directory_alone(export) -> None:
    script = Path(__file__).with_name("load_alone.py")
    given = [str(export / "model"), str(export / "picture.png")]
    found = subprocess.run(
        [sys.executable, str(script), *given],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["module"] == "transformers_modules"
    assert told["hidden"] == []
    ids = load(export / "model").generate(**ask(export / "model", export), max_new_tokens=8)
    wanted = AutoProcessor.from_pretrained(export / "model").batch_decode(ids, skip_special_tokens=True)
    assert [told["text"]] == [told["pipeline"]] == wanted


def test_unfolded_it_loads_with_its_adapters(export, tmp_path) -> None:
    given = ["--checkpoint", str(export / "run"), "--output", str(tmp_path / "apart")]
    assert merge([*given, "--no-fold", "--dtype", "bf16"]) == 0
    model = load(tmp_path / "apart", dtype=torch.float32)
    trained = find_trained(export / "run").load()
    state = model.state_dict()
    for name, tensor in trained.trainable_parameters().items():
        assert torch.equal(state[name], tensor), name
    assert any(".lora_" in name for name in state)


def test_the_processor_asks_as_the_trainer_does(export) -> None:
    source = find_trained(export / "run")
    collator = Collator(
        load_tokenizer(source.tokenizer_source),
        build_image_transform(source.processor_source, None),
        task="caption",
        max_tokens=64,
        prompt=PROMPT,
        for_generation=True,
    )
    picture = Image.open(export / "picture.png")
    batch = collator([Sample(key="0", image=picture, record={})])
    inputs = ask(export / "model", export)
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    torch.testing.assert_close(inputs["pixel_values"], batch.pixel_values)


OWN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


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
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    for conversation in (plain, parts):
        ids = processor.apply_chat_template(conversation, **settings)["input_ids"]
        assert ids.tolist() == [encode_chat_prompt(tokenizer, plain)]
        # In two steps, as many do.
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert torch.equal(processor(text=text)["input_ids"], ids)
    # The trainer's own entries read the directory, too.
    assert encode_chat_prompt(load_tokenizer(str(tmp_path / "model")), plain) == ids[0].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": [None, None, None], "text": ["a", "b"]}, "3 pictures for 2 prompts"),
        ({"images": [["x", "y"]], "text": ["a"]}, "several pictures for one prompt"),
    ],
)
def test_pictures_that_do_not_fit_the_prompts_are_refused(export, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(export / "model")(**given)


def test_transparency_is_laid_on_white(export) -> None:
    processor = AutoProcessor.from_pretrained(export / "model")
    clear = processor(images=Image.new("RGBA", (20, 20), (0, 0, 0, 0)))["pixel_values"]
    white = processor(images=Image.new("RGB", (20, 20), "white"))["pixel_values"]
    assert torch.equal(clear, white)
