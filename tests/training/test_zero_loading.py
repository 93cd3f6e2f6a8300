"""Backbones read straight into ZeRO-3's partitions equal what transformers loads, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_checkpoints import save_bin
from tiny_models import text_config, vision_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from dehvf_ds.distributed import World
from dehvf_ds.training.zero import Zero3Partitions

WORKER = Path(__file__).parent / "load_worker.py"
# No size is a multiple of 2 or 4 ranks; widths of attention are what its heads need.
ODD = {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 51, "num_hidden_layers": 3}
ODD |= {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64}


def save_llm(
    directory: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, **more: Any
) -> str:
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.max_length = 33
    model.save_pretrained(directory, **more)
    return str(directory)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Backbones by name; of mixtral and bin some weights are not one tensor of a safetensors file."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(7)
    found = {
        "llama": save_llm(root / "llama", text_config(**ODD)),
        "tied-sharded-bf16": save_llm(
            root / "tied",
            text_config(**ODD, tie_word_embeddings=True),
            dtype=torch.bfloat16,
            max_shard_size="8KB",
        ),
        "twin": save_llm(root / "twin", text_config(**ODD)),
        "gpt_neox": save_llm(root / "neox", GPTNeoXConfig(**ODD)),
        "mixtral": save_llm(root / "mixtral", MixtralConfig(**ODD, num_local_experts=3)),
    }
    state = {
        name: t.clone()
        for name, t in AutoModelForCausalLM.from_pretrained(found["llama"]).state_dict().items()
    }
    save_bin(state, root / "bin")
    (root / "bin/config.json").write_text((root / "llama/config.json").read_text())
    (root / "bin/generation_config.json").write_text((root / "llama/generation_config.json").read_text())
    found["bin"] = str(root / "bin")
    AutoModel.from_config(vision_config("dinov2")).save_pretrained(root / "dinov2")
    words = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    both = CLIPModel(CLIPConfig(text_config=words, vision_config=vision_config().to_dict()))
    both.save_pretrained(root / "clip")
    return found | {"dinov2": str(root / "dinov2"), "clip": str(root / "clip")}


def load(tmp_path: Path, jobs: list[dict], ranks: int) -> list[list[float]]:
    """What the ranks found, by job."""
    run_ranks(WORKER, [str(tmp_path / "result.json"), json.dumps(jobs)], ranks)
    found = json.loads((tmp_path / "result.json").read_text())
    return [found[job :: len(jobs)] for job in range(len(jobs))]


def job(bases: dict[str, str], llm: str, tower: str, dtype: str = "float32", **zero: Any) -> dict[str, Any]:
    backbones = {"language_model": bases[llm], "vision_tower": bases[tower]}
    return {"bases": backbones, "dtype": dtype, "zero": zero, "measure": False}


OFFLOAD = {"offload_param": {"device": "cpu"}}
# The last number: how many of the two are read in shares.
PAIRS = [
    ("llama", "dinov2", "bfloat16", {}, 2),
    ("tied-sharded-bf16", "clip", "float32", OFFLOAD, 2),
    ("gpt_neox", "clip", "float32", {}, 2),
    ("mixtral", "dinov2", "float32", {}, 1),
    ("bin", "dinov2", "bfloat16", {}, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gathered_weights_are_those_that_transformers_loads(tmp_path: Path, bases, ranks: int) -> None:
    # hpZ's groups are a process's, so that on four ranks all cases have them.
    hpz = {"zero_hpz_partition_size": 2} if ranks == 4 else {}
    jobs = [job(bases, llm, tower, dtype, **zero, **hpz) for llm, tower, dtype, zero, _ in PAIRS]
    if ranks == 2:
        # The same names and shapes on another node's disk; other files, which are read another way.
        jobs += [
            job(bases, "llama", "clip") | {"other": {"language_model": bases[b]}} for b in ("twin", "bin")
        ]
    found = load(tmp_path, jobs, ranks)
    assert found[: len(PAIRS)] == [[num_read] * ranks for *_, num_read in PAIRS]
    for said in found[len(PAIRS) :]:
        assert all("rank 1 finds other weights there than rank 0" in text for text in said)


@pytest.mark.parametrize(
    ("num_ranks", "num_bytes", "said"), [(2, 3e9, True), (1, 3e9, False), (2, 1e9, False)]
)
def test_a_large_model_through_one_ranks_memory_is_said(
    capsys, num_ranks: int, num_bytes: int, said: bool
) -> None:
    ds_config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    partitions = Zero3Partitions(ds_config, World(0, 0, num_ranks, num_ranks, torch.device("cpu")))
    with partitions.filled_by_transformers("llm", int(num_bytes)):
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    assert ("note: llm: rank 0 reads all 3 GB" in capsys.readouterr().err) == said


@pytest.mark.slow
def test_a_rank_holds_little_more_than_its_share(tmp_path: Path, bases) -> None:
    sizes = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    large = save_llm(tmp_path / "large", text_config(**sizes))
    # The first load imports.
    jobs = [job(bases, "llama", "clip"), job(bases | {"large": large}, "large", "clip") | {"measure": True}]
    _, peaks = load(tmp_path, jobs, 4)
    # A share is a quarter; where transformers loads, rank 0 maps all of it.
    assert max(peaks) < 0.5
