"""The fingerprint of a checkpoint: the same for the same weights however they are stored, else by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import fingerprint_of, llama, save_bin, state_of
from tiny_models import hub_snapshot, text_config, vision_config
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from dehvf_ds.model import ModelError
from dehvf_ds.model.adapter import base_fingerprint, check_base
from dehvf_ds.model.fingerprint import differences, weights_fingerprint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def same(one: dict[str, str], other: dict[str, str]) -> bool:
    return not differences(one, other) and not differences(other, one)


def test_it_holds_the_values_at_the_positions_of_every_kind_of_tensor(tmp_path) -> None:
    whole = torch.randn(6, 10)
    state = {
        "turned": whole.t(),
        "part": torch.nn.Parameter(whole[2:5]),
        "row": torch.tensor([0.1]).bfloat16(),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 3),
    }
    text = fingerprint_of({name: tensor.detach().clone() for name, tensor in state.items()})
    shape, *values = text["turned"].split()
    assert (shape, len(values)) == ("10x6", 4)
    assert torch.isin(torch.tensor([float(value) for value in values]), whole).all()
    assert (text["scalar"], text["row"], text["empty"]) == ("1 0.5", "1 0.100097656", "0x3")
    save_bin(state, tmp_path / "bin")
    assert weights_fingerprint(str(tmp_path / "bin"), vision=False) == text


def test_a_checkpoint_changed_in_place_is_read_again(base) -> None:
    before = weights_fingerprint(base, vision=False)
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {FIRST: tensors[FIRST] * 2}, file)
    assert differences(before, weights_fingerprint(base, vision=False)) == [FIRST]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["whole", "sharded", "bin", "bin_sharded", "legacy", "legacy_sharded"])
def test_a_copy_in_another_dtype_or_layout_is_the_same_base(tmp_path, base, dtype, layout) -> None:
    model = llama().to(dtype)
    copy = tmp_path / "copy"
    if "bin" in layout or "legacy" in layout:
        shards = 3 if "sharded" in layout else 1
        save_bin(model.state_dict(), copy, zipped="bin" in layout, shards=shards)
        model.config.save_pretrained(copy)
    else:
        model.save_pretrained(copy, max_shard_size="20KB" if layout == "sharded" else "1GB")
        assert (len(list(copy.glob("*.safetensors"))) > 1) == (layout == "sharded")
    check_base(base_fingerprint(base, vision=False), str(copy), vision=False, owner="run")
    check_base(base_fingerprint(str(copy), vision=False), base, vision=False, owner="run")
    if dtype == torch.float32:
        assert weights_fingerprint(str(copy), vision=False) == weights_fingerprint(base, vision=False)


def test_roundings_on_different_ways_agree_and_what_fp16_cannot_hold_is_no_difference() -> None:
    weight = torch.randn(64)
    ways = (weight.bfloat16(), weight.half().bfloat16(), weight.half())
    assert all(same(fingerprint_of({"w": ways[0]}), fingerprint_of({"w": other})) for other in ways)
    large = torch.tensor([1e-9, 1e6, -1e6, 3e-6])
    assert not differences(fingerprint_of({"w": large}), fingerprint_of({"w": large.half()}))
    assert differences(fingerprint_of({"w": -large}), fingerprint_of({"w": large.half()})) == ["w"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight"])
def test_a_tied_head_may_be_stored_or_not(name) -> None:
    state = state_of(llama(tied=True))
    del state["lm_head.weight"]
    stored = state | {name: state["model.embed_tokens.weight"].clone()}
    assert same(fingerprint_of(state), fingerprint_of(stored))
    untied = state | {name: 2 * state["model.embed_tokens.weight"]}
    assert differences(fingerprint_of(stored), fingerprint_of(untied)) == [name]
    assert differences(fingerprint_of(state), fingerprint_of(untied)) == [f"{name} (added)"]


def test_other_prefixes_and_words_in_names_and_old_buffers_are_no_difference() -> None:
    state = state_of(llama())
    shorter = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    renamed = {name.replace("self_attn", "attention"): tensor for name, tensor in state.items()}
    old = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for other in (shorter, renamed, old):
        assert same(fingerprint_of(state), fingerprint_of(other))
    name = "model.layers.1.attention.q_proj.weight"
    assert differences(fingerprint_of(state), fingerprint_of(renamed | {name: 1.05 * renamed[name]})) == [
        f"{name} (added)",
        "model.layers.1.self_attn.q_proj.weight (missing)",
    ]


anything = st.floats(width=32, allow_nan=False)
ordinary = st.floats(2**-10, 2**13, width=32)


@given(st.lists(anything, min_size=1, max_size=12), st.permutations(DTYPES), st.integers(1, 3))
def test_rounding_never_differs(values, dtypes, number) -> None:
    rounded = exact = torch.tensor(values)
    for dtype in dtypes[:number]:
        rounded = rounded.to(dtype)
    assert same(fingerprint_of({"w": exact}), fingerprint_of({"w": rounded}))


@given(st.lists(ordinary, min_size=1, max_size=12), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_scaling_always_differs(values, one, other) -> None:
    tensor = torch.tensor(values)
    scaled = fingerprint_of({"w": (1.05 * tensor).to(other)})
    assert differences(fingerprint_of({"w": tensor.to(one)}), scaled) == ["w"]


def test_a_noised_layer_is_refused_by_name(tmp_path, base) -> None:
    model = llama()
    torch.manual_seed(1)
    for parameter in model.model.layers[1].parameters():
        parameter.data *= 1 + 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "vicuna")
    identity = json.loads(json.dumps(base_fingerprint(base, vision=False), sort_keys=True))
    with pytest.raises(ModelError) as caught:
        check_base(identity, str(tmp_path / "vicuna"), vision=False, owner="runs/x")
    assert str(caught.value) == (
        f"runs/x was trained on {base}; what is now in {tmp_path / 'vicuna'} differs from it in the weights "
        "of model.layers.1.input_layernorm.weight (and 8 more)"
    )


def test_tensors_missing_added_or_of_another_shape_are_named() -> None:
    state = state_of(llama())
    other = state | {FIRST: state[FIRST][:16], "model.layers.10.extra.weight": torch.randn(4, 4)}
    del other["model.layers.3.mlp.down_proj.weight"]
    assert differences(fingerprint_of(state), fingerprint_of(other)) == [
        f"{FIRST} (shape 16x32, not 32x32)",
        "model.layers.3.mlp.down_proj.weight (missing)",
        "model.layers.10.extra.weight (added)",
    ]


def test_of_a_two_tower_checkpoint_only_the_tower_counts(tmp_path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision_config().to_dict()))
    whole.save_pretrained(tmp_path / "clip")
    CLIPVisionModel.from_pretrained(tmp_path / "clip").half().save_pretrained(tmp_path / "tower")
    wanted = weights_fingerprint(str(tmp_path / "clip"), vision=True)
    assert not differences(wanted, weights_fingerprint(str(tmp_path / "tower"), vision=True))
    whole.text_model.embeddings.token_embedding.weight.data *= 2
    whole.vision_model.post_layernorm.weight.data *= 2
    whole.save_pretrained(tmp_path / "other")
    other = weights_fingerprint(str(tmp_path / "other"), vision=True)
    assert differences(wanted, other) == ["vision_model.post_layernorm.weight"]


def test_of_a_multimodal_checkpoint_only_the_decoder_counts(tmp_path) -> None:
    decoder = llama()
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text_config().to_dict(), vision_config=vision_config().to_dict())
    )
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.save_pretrained(tmp_path / "llava")
    assert same(weights_fingerprint(str(tmp_path / "llava"), vision=False), fingerprint_of(state_of(decoder)))


@pytest.mark.parametrize("kept", [0, 30, -2000])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy", "index"])
def test_a_truncated_file_is_named(tmp_path, layout, kept) -> None:
    source = tmp_path / "damaged"
    if layout in ("bin", "legacy"):
        save_bin(state_of(llama()), source, zipped=layout == "bin")
    else:
        llama().save_pretrained(source, max_shard_size="20KB" if layout == "index" else "1GB")
    file = next(path for path in source.iterdir() if "model" in path.name and "-0" not in path.name)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"{file.name}: cannot be read: \S+"):
        weights_fingerprint(str(source), vision=False)


def test_a_hub_id_is_read_from_the_local_cache(tmp_path, base, monkeypatch) -> None:
    snapshot = hub_snapshot(monkeypatch, tmp_path, "someone/llama")
    llama().save_pretrained(snapshot, max_shard_size="20KB")
    assert weights_fingerprint("someone/llama", vision=False) == weights_fingerprint(base, vision=False)
    next(snapshot.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"llama: model-\S+ is missing, which model\.safetensors\.index"):
        weights_fingerprint("someone/llama", vision=False)
    with pytest.raises(ModelError, match=r"^someone/other: no weights found, neither"):
        weights_fingerprint("someone/other", vision=False)
