"""An export that is not whole does not load: in the trainer, by its Auto class, or by its code alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import build_bases, save, trained_model
from transformers import AutoModelForImageTextToText

from dehvf_ds.export.cli import main as merge
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.weights import find_trained

MLP = "language_model.model.layers.1.mlp"
# Of every kind of tensor one.
FOLDED = [
    *["projector.w_down", "projector.bias", "fuser.w_key", "fuser.layer_embedding"],
    *["reader.w_query", "reader.w_out", "reader.key_positions", "reader.value_positions"],
    *[f"{MLP}.gain_in", f"{MLP}.gain_out", f"{MLP}.ffn.up_proj.weight"],
    *["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
    *["language_model.model.norm.weight", "language_model.model.layers.0.input_layernorm.weight"],
]
UNFOLDED = [
    *[f"{MLP}.ffn.gate_proj.lora_A.default.weight", f"{MLP}.ffn.down_proj.lora_B.default.weight"],
    *[f"{MLP}.ffn.gate_proj.base_layer.weight", "reader.w_out"],
]
# Named as hubs name them.
TOWER = ["class_embedding", "position_embedding.weight", "layers.1.self_attn.v_proj.bias"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """``folded`` and ``apart``."""
    root = tmp_path_factory.mktemp("exports")
    bases = build_bases(root)
    save(trained_model(bases, task="caption", prompt="Picture:"), bases, root / "run/adapter")
    for name, flags in (("folded", []), ("apart", ["--no-fold"])):
        assert merge(["--checkpoint", str(root / "run"), "--output", str(root / name), *flags]) == 0
    return root


def changed(export: Path, tmp_path: Path, change) -> Path:
    """A copy with other tensors and without the record of the files' sizes, as after somebody's own edits."""
    for path in export.iterdir():
        if path.is_file() and path.name != "export.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def ways(directory: Path):
    yield lambda: AutoModelForImageTextToText.from_pretrained(directory)
    yield lambda: DehvfForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    yield lambda: AutoModelForImageTextToText.from_pretrained(directory, device_map="auto")
    yield lambda: AutoModelForImageTextToText.from_pretrained(directory, ignore_mismatched_sizes=True)
    yield lambda: find_trained(directory).load("fp32")


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        AutoModelForImageTextToText.from_pretrained(directory)


@pytest.mark.parametrize("name", FOLDED)
def test_a_missing_tensor_is_named(exports, tmp_path, name) -> None:
    directory = changed(exports / "folded", tmp_path, lambda tensors: tensors.pop(name))
    assert_refused(directory, rf"lacks 1 weights, {name}")


def test_it_is_refused_whichever_way_it_is_loaded(exports, tmp_path) -> None:
    directory = changed(exports / "folded", tmp_path, lambda tensors: tensors.pop("projector.w_down"))
    for load in ways(directory):
        with pytest.raises(ModelError, match=r"lacks 1 weights, projector\.w_down"):
            load()


@pytest.mark.parametrize("name", UNFOLDED)
def test_a_missing_tensor_is_named_where_adapters_are_apart(exports, tmp_path, name) -> None:
    directory = changed(exports / "apart", tmp_path, lambda tensors: tensors.pop(name))
    assert_refused(directory, rf"lacks 1 weights, {name}")


@pytest.mark.parametrize("end", TOWER)
def test_a_missing_tensor_of_the_tower_is_named(exports, tmp_path, end) -> None:
    def drop(tensors) -> None:
        (name,) = [name for name in tensors if name.startswith("vision_tower.") and name.endswith(end)]
        del tensors[name]

    assert_refused(changed(exports / "folded", tmp_path, drop), rf"lacks 1 weights, vision_tower\..*{end}")


def test_a_name_that_is_no_weights_is_named(exports, tmp_path) -> None:
    def rename(tensors) -> None:
        tensors["fuser.w_kee"] = tensors["fuser.w_key"].clone()

    assert_refused(changed(exports / "folded", tmp_path, rename), r"holds 1 weights, fuser\.w_kee among them")


@pytest.mark.parametrize("name", ["projector.w_down", f"{MLP}.ffn.down_proj.weight"])
def test_another_shape_is_refused(exports, tmp_path, name) -> None:
    directory = changed(exports / "folded", tmp_path, lambda t: t.update({name: t[name][:3].clone()}))
    assert_refused(directory, f"{name} has shape .3, ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reader.w_out", float("nan")),
        (f"{MLP}.gain_in", float("inf")),
        ("language_model.lm_head.weight", float("-inf")),
    ],
)
def test_values_that_are_no_numbers_are_refused(exports, tmp_path, name, value) -> None:
    def spoil(tensors) -> None:
        tensors[name].view(-1)[5] = value

    assert_refused(changed(exports / "folded", tmp_path, spoil), f"{name} holds values that are not finite")


def test_a_configuration_of_fewer_layers_is_refused(exports, tmp_path) -> None:
    directory = changed(exports / "folded", tmp_path, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"fuser\.layer_embedding has shape \[4, 4\], not \[3, 4\]"):
        AutoModelForImageTextToText.from_pretrained(directory)


def test_what_is_whole_loads_and_tells_what_it_was_asked(exports) -> None:
    for name in ("folded", "apart"):
        for load in ways(exports / name):
            load()
    model, info = AutoModelForImageTextToText.from_pretrained(exports / "folded", output_loading_info=True)
    assert isinstance(model, DehvfForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_code_beside_the_weights_refuses_too(exports, tmp_path) -> None:
    directory = changed(exports / "folded", tmp_path, lambda tensors: tensors.pop("projector.w_down"))
    for path in exports.joinpath("folded").glob("*.py"):
        assert (directory / path.name).read_bytes() == path.read_bytes()
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    alone = get_class_from_dynamic_module("modeling.DehvfForConditionalGeneration", str(directory))
    assert alone.__module__.startswith("transformers_modules")
    config = json.loads((directory / "config.json").read_text())["auto_map"]["AutoConfig"]
    config = get_class_from_dynamic_module(config, str(directory)).from_pretrained(directory)
    with pytest.raises(ValueError, match=r"lacks 1 weights, projector\.w_down"):
        alone.from_pretrained(directory, config=config)
