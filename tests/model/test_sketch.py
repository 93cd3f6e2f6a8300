from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import llama, save_bin, sketch, state_of
from tiny_models import text_config, vision_config
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dehvf_ds.model import ModelError
from dehvf_ds.model.fingerprint import differences, sample_positions
from dehvf_ds.model.fingerprint import weights_fingerprint as sketch_weights

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


# --- what is sampled ---


@given(st.integers(0, 2**40))
def test_positions_lie_in_the_tensor(num_elements) -> None:
    positions = sample_positions(num_elements)
    assert len(positions) == len(set(positions)) == min(num_elements, len(positions), 4)
    assert all(0 <= position < num_elements for position in positions)
    assert num_elements < 8 or len(positions) == 4


def test_a_sketch_holds_the_values_at_the_positions() -> None:
    tensor = torch.randn(5, 3, 7)
    text = sketch({"w": tensor, "scalar": torch.tensor(0.5), "row": torch.tensor([0.1]).bfloat16()})
    shape, *values = text["w"].split()
    assert shape == "5x3x7"
    assert torch.tensor([float(v) for v in values]).equal(tensor.flatten()[sample_positions(105)])
    assert (text["scalar"], text["row"]) == ("1 0.5", "1 0.100097656")


def test_views_and_scalars_and_empty_tensors_in_bin_files(tmp_path) -> None:
    whole = torch.randn(6, 10)
    state = {
        "turned": whole.t(),
        "part": torch.nn.Parameter(whole[2:5]),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 3),
    }
    save_bin(state, tmp_path / "bin")
    expected = sketch({name: tensor.detach().clone() for name, tensor in state.items()})
    assert sketch_weights(str(tmp_path / "bin"), vision=False) == expected


def test_shards_in_another_order_are_the_same(tmp_path) -> None:
    state = state_of(llama())
    save_bin(state, tmp_path / "one", shards=2)
    save_bin(dict(reversed(state.items())), tmp_path / "other", shards=3)
    one = sketch_weights(str(tmp_path / "one"), vision=False)
    assert list(one.items()) == list(sketch_weights(str(tmp_path / "other"), vision=False).items())


def test_old_buffers_are_not_compared() -> None:
    state = state_of(llama())
    old = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    old["vision_model.embeddings.position_ids"] = torch.arange(4)
    assert sketch(old) == sketch(state)


def test_a_checkpoint_changed_in_place_is_read_again(base) -> None:
    before = sketch_weights(base, vision=False)
    assert sketch_weights(base, vision=False) == before
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {FIRST: tensors[FIRST] * 2}, file)
    assert differences(before, sketch_weights(base, vision=False)) == [FIRST]


# --- parts of checkpoints ---


def test_of_a_two_tower_checkpoint_only_the_tower_counts(tmp_path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
    }
    text = CLIPTextConfig(**sizes, num_attention_heads=2, eos_token_id=2, bos_token_id=1)
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict()))
    whole.save_pretrained(tmp_path / "clip")
    CLIPVisionModel.from_pretrained(tmp_path / "clip").half().save_pretrained(tmp_path / "tower")
    wanted = sketch_weights(str(tmp_path / "clip"), vision=True)
    assert not differences(wanted, sketch_weights(str(tmp_path / "tower"), vision=True))
    whole.text_model.embeddings.token_embedding.weight.data *= 2
    whole.vision_model.post_layernorm.weight.data *= 2
    whole.save_pretrained(tmp_path / "other")
    other = sketch_weights(str(tmp_path / "other"), vision=True)
    assert differences(wanted, other) == ["vision_model.post_layernorm.weight"]


def test_of_a_multimodal_checkpoint_only_the_decoder_counts(tmp_path) -> None:
    decoder = llama()
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text_config().to_dict(), vision_config=vision_config().to_dict())
    )
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.save_pretrained(tmp_path / "llava")
    both = sketch_weights(str(tmp_path / "llava"), vision=False)
    assert not differences(both, sketch(state_of(decoder)))
    assert not differences(sketch(state_of(decoder)), both)


# --- files ---


def test_weights_that_are_not_there_are_named_in_one_line(tmp_path, base) -> None:
    with pytest.raises(ModelError, match=r"^\S+: no weights found, neither model.safetensors nor \S+$"):
        sketch_weights(str(tmp_path), vision=False)
    save_bin(state_of(llama()), tmp_path / "bin", shards=2)
    (tmp_path / "bin" / "pytorch_model-1.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-1\.bin is missing, which pytorch_model\.bin\.index"):
        sketch_weights(str(tmp_path / "bin"), vision=False)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"\x01\x02 nothing that could be read", b"\x02" + bytes(7) + b"??"])
def test_a_damaged_file_is_named(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: cannot be read: \S+"):
        sketch_weights(str(tmp_path), vision=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_ends_too_early_is_named(base, legacy) -> None:
    file = Path(base) / "model.safetensors"
    if legacy:
        file.unlink()
        file = Path(base) / "pytorch_model.bin"
        torch.save(llama().state_dict(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=rf"{file.name}: cannot be read: \S+"):
        sketch_weights(base, vision=False)


def test_a_hub_id_is_read_from_the_local_cache(tmp_path, base, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    llama().save_pretrained(snapshot, max_shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert sketch_weights("someone/llama", vision=False) == sketch_weights(base, vision=False)
    next(snapshot.glob("*.safetensors")).unlink()
    with pytest.raises(
        ModelError, match=r"someone/llama: model-\S+ is missing, which model\.safetensors\.index"
    ):
        sketch_weights("someone/llama", vision=False)
    with pytest.raises(ModelError, match="someone/other: no weights found"):
        sketch_weights("someone/other", vision=False)
