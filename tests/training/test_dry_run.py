"""The scaled-down copies of a dry run are of the same architecture, and run."""

from __future__ import annotations

import pytest
import torch
from tiny_entries import arguments
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from dehvf_ds import train
from dehvf_ds.config import UserError
from dehvf_ds.model.trial import scaled_down
from dehvf_ds.training import dry_run
from dehvf_ds.training.step import StopRequest


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_decoder_keeps_its_kind_and_its_words(kind: type[PreTrainedConfig]) -> None:
    config = kind(vocab_size=1000)
    small = scaled_down(config, num_layers=2)
    model = AutoModelForCausalLM.from_config(small)
    assert type(small) is kind
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model(input_ids=torch.tensor([[999, 3]])).logits.shape == (1, 2, 1000)
    assert len(model.model.layers) == 2
    grouped = config.num_key_value_heads != config.num_attention_heads
    assert (small.num_key_value_heads != small.num_attention_heads) == grouped


def test_a_decoder_with_a_rotary_factor_for_each_pair_keeps_its_heads() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
    rope = factors | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    positions = {"original_max_position_embeddings": 64, "max_position_embeddings": 128}
    config = Phi3Config(**sizes, **positions, pad_token_id=None, rope_parameters=rope)
    small = scaled_down(config, num_layers=2)
    assert (small.hidden_size, small.num_attention_heads) == (48, 2)
    assert AutoModelForCausalLM.from_config(small)(input_ids=torch.tensor([[9, 3]])).logits.shape[-1] == 100


@pytest.mark.parametrize("kind", [CLIPVisionConfig, Dinov2Config])
def test_a_tower_keeps_its_blocks_and_its_picture(kind: type[PreTrainedConfig]) -> None:
    config = kind(image_size=56, patch_size=14)
    output = AutoModel.from_config(scaled_down(config))(torch.zeros(1, 3, 56, 56), output_hidden_states=True)
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert output.hidden_states[-1].shape[-1] == 32


def test_a_dry_run_finds_that_the_runs_folder_cannot_be_had(world, alone, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    given = ["--dry-run", "--data.num_workers", "0", "--run_dir"]
    for place in ("file", "file/run", "no/such\0"):
        with pytest.raises(UserError, match="run_dir"):
            train.main(arguments(world, "dry", *given, str(tmp_path / place)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_opens_the_scorer_and_leaves_no_folder(world, alone, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    asked = ["--data.val", str(world / "test"), "--eval.every_steps", "1"]
    place = ["--dry-run", "--data.num_workers", "0", "--run_dir", str(tmp_path / "some/run")]
    with pytest.raises(UserError, match="needs Java"):
        train.main(arguments(world, "dry", *asked, *place))
    assert not any(tmp_path.iterdir())


def test_a_rank_that_waits_for_the_others_ends_when_asked(world, alone, monkeypatch) -> None:
    # A handler of Python's would run only when the wait in C is over.
    monkeypatch.setattr(StopRequest, "install", None)
    monkeypatch.setattr(dry_run, "init_process_group", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(world, "dry", "--dry-run"))
