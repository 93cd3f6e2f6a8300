from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import llama, save_bin, sketch, state_of
from tiny_models import vision_config
from transformers import AutoModel

from dehvf_ds.model import ModelError
from dehvf_ds.model.adapter import base_fingerprint as base_identity, check_base
from dehvf_ds.model.fingerprint import differences
from dehvf_ds.model.fingerprint import weights_fingerprint as sketch_weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


# --- the same weights ---


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
    check_base(base_identity(base, vision=False), str(copy), vision=False, owner="run")
    check_base(base_identity(str(copy), vision=False), base, vision=False, owner="run")
    if dtype == torch.float32:
        assert sketch_weights(str(copy), vision=False) == sketch_weights(base, vision=False)


def test_roundings_on_different_ways_to_bf16_agree() -> None:
    state = state_of(llama())
    half = {name: tensor.half() for name, tensor in state.items()}
    one = sketch({name: tensor.bfloat16() for name, tensor in state.items()})
    other = sketch({name: tensor.bfloat16() for name, tensor in half.items()})
    assert not differences(one, other)
    assert not differences(sketch(half), one)
    assert not differences(one, sketch(half))


def test_what_fp16_cannot_hold_is_no_difference() -> None:
    state = {"w": torch.tensor([1e-9, 1e6, -1e6, 3e-6])}
    half = {"w": state["w"].half()}
    assert not half["w"].isfinite().all()
    assert not differences(sketch(state), sketch(half))
    assert differences(sketch({"w": -state["w"]}), sketch(half)) == ["w"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight"])
def test_a_tied_head_may_be_stored_or_not(name) -> None:
    state = state_of(llama(tied=True))
    del state["lm_head.weight"]
    stored = state | {name: state["model.embed_tokens.weight"].clone()}
    assert not differences(sketch(state), sketch(stored))
    assert not differences(sketch(stored), sketch(state))
    untied = state | {name: 2 * state["model.embed_tokens.weight"]}
    assert differences(sketch(stored), sketch(untied)) == [name]
    assert differences(sketch(state), sketch(untied)) == [f"{name} (added)"]


def test_names_with_another_prefix_or_word_are_the_same() -> None:
    state = state_of(llama())
    shorter = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    renamed = {name.replace("self_attn", "attention"): tensor for name, tensor in state.items()}
    for other in (shorter, renamed):
        assert not differences(sketch(state), sketch(other))
        assert not differences(sketch(other), sketch(state))
    name = "model.layers.1.attention.q_proj.weight"
    renamed[name] = 1.05 * renamed[name]
    assert differences(sketch(state), sketch(renamed)) == [
        f"{name} (added)",
        "model.layers.1.self_attn.q_proj.weight (missing)",
    ]


# --- other weights ---


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_one_finetuned_tensor_is_found(dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of(llama()).items()}
    name = "model.layers.2.mlp.up_proj.weight"
    tuned = state | {name: state[name] * 1.01}
    assert differences(sketch(state), sketch(tuned)) == [name]


def test_a_noised_layer_is_refused_by_name(tmp_path, base) -> None:
    model = llama()
    torch.manual_seed(1)
    for parameter in model.model.layers[1].parameters():
        parameter.data *= 1 + 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "vicuna")
    identity = json.loads(json.dumps(base_identity(base, vision=False), sort_keys=True))
    expected = (
        f"runs/x was trained on {base}; what is now in {tmp_path / 'vicuna'} differs from it in the weights "
        "of model.layers.1.input_layernorm.weight (and 8 more)"
    )
    with pytest.raises(ModelError) as caught:
        check_base(identity, str(tmp_path / "vicuna"), vision=False, owner="runs/x")
    assert str(caught.value) == expected


def test_tensors_missing_added_or_of_another_shape_are_named() -> None:
    state = state_of(llama())
    other = state | {FIRST: state[FIRST][:16], "model.layers.10.extra.weight": torch.randn(4, 4)}
    del other["model.layers.3.mlp.down_proj.weight"]
    assert differences(sketch(state), sketch(other)) == [
        f"{FIRST} (shape 16x32, not 32x32)",
        "model.layers.3.mlp.down_proj.weight (missing)",
        "model.layers.10.extra.weight (added)",
    ]


def test_another_vision_tower_is_refused_by_name(tmp_path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        AutoModel.from_config(vision_config("dinov2")).save_pretrained(tmp_path / str(seed))
    identity = base_identity(str(tmp_path / "0"), vision=True)
    with pytest.raises(ModelError, match=r"differs from it in the weights of embeddings\..* \(and \d+ more"):
        check_base(identity, str(tmp_path / "1"), vision=True, owner="runs/x")


# --- properties of single tensors ---

anything = st.floats(width=32, allow_nan=False)
ordinary = st.floats(2**-10, 2**13, width=32)


@given(st.lists(anything, min_size=1, max_size=12), st.permutations(DTYPES), st.integers(1, 3))
def test_rounding_never_differs(values, dtypes, number) -> None:
    exact = torch.tensor(values)
    rounded = exact
    for dtype in dtypes[:number]:
        rounded = rounded.to(dtype)
    assert not differences(sketch({"w": exact}), sketch({"w": rounded}))
    assert not differences(sketch({"w": rounded}), sketch({"w": exact}))


@given(st.lists(ordinary, min_size=1, max_size=12), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_scaling_always_differs_except_of_zeros(values, one, other) -> None:
    tensor = torch.tensor(values)
    scaled = sketch({"w": (1.05 * tensor).to(other)})
    assert differences(sketch({"w": tensor.to(one)}), scaled) == ["w"]
    zeros = torch.zeros(len(values))
    assert not differences(sketch({"w": zeros.to(one)}), sketch({"w": 1.05 * zeros}))
