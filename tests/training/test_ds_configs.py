"""The DeepSpeed files that we ship: every key is one that DeepSpeed reads, and all train the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import REPOSITORY, run_ranks
from tiny_models import text_config, vision_config
from training.zero_worker import run_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.training.deepspeed_json import read_deepspeed_json

CONFIGS = REPOSITORY / "ds_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
WORKER = Path(__file__).parent / "zero_worker.py"

HPZ_WORKER = """
import json, sys
from pathlib import Path
from deepspeed.utils import groups

sys.path.insert(0, {tests!r})
from dehvf_ds.distributed import run_entry
from training.zero_worker import main

def entry(args):
    main(Path(args[0]), json.loads(args[1]))
    print("ranks of a secondary group:", groups._get_zero_param_intra_parallel_group_world_size())

run_entry(entry)
"""


def read_config(name: str) -> dict[str, Any]:
    """A shipped file as the engine completes it for one process."""
    config = run_config(Path("unused"), {"micro_batch_size": 4})
    return read_deepspeed_json(str(CONFIGS / f"{name}.json"), config, 1)


def test_these_are_the_files() -> None:
    assert NAMES == ["zero2", "zero3", "zero3_hpz", "zero3_offload"]


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key_and_the_numbers_fit_our_model(name: str) -> None:
    given = json.loads((CONFIGS / f"{name}.json").read_text())
    assert given["bf16"] == {"enabled": "auto"}
    assert given["data_types"] == {"grad_accum_dtype": "fp32"}
    # The run's configuration owns these.
    assert not given.keys() & {"train_batch_size", "gradient_clipping", "optimizer", "scheduler"}
    read_config(name)
    zero = given["zero_optimization"]
    # DeepSpeed takes buckets of 5e8 where none is named, 1 GB of bf16 for 5 M trainable parameters.
    assert zero["reduce_bucket_size"] == 20_000_000
    if zero["stage"] == 3:
        # The largest trainable of the 13B recipe is 655,360; a matrix of CLIP's attention 1024 x 1024.
        assert 655_360 < zero["stage3_param_persistence_threshold"] < 1024 * 1024


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ds_configs")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(directory / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(directory / "tower")
    (directory / "hpz_worker.py").write_text(HPZ_WORKER.format(tests=str(REPOSITORY / "tests")))
    return directory


def train(job: Path, name: str, *, ranks: int = 2, worker: Path = WORKER, **zero: Any) -> tuple[dict, str]:
    """Two steps with a shipped file; returns the result and rank 0's output.

    Every tensor of the tiny model lies below the file's persistence threshold: 0 has them partitioned.
    """
    ds_config = json.loads((CONFIGS / f"{name}.json").read_text())
    if ds_config["zero_optimization"]["stage"] == 3:
        zero = {"stage3_param_persistence_threshold": 0} | zero
    ds_config["zero_optimization"] |= zero
    ds_config["bf16"] = {"enabled": False}
    (job / "ds.json").write_text(json.dumps(ds_config))
    case = {"kind": "mixed", "micro_batch_size": 2, "steps": 2}
    outputs = run_ranks(worker, [str(job), json.dumps(case)], ranks)
    return json.loads((job / "result.json").read_text()), outputs[0]


@pytest.fixture(scope="module")
def zero3_losses(job: Path) -> list[float]:
    result, _ = train(job, "zero3")
    assert result["silent"] == []
    assert result["losses"][0] > result["losses"][1] + 1e-3
    return result["losses"]


# On the CPU the offloaded partitions are not page-locked, and lie where they would lie anyway.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3_offload"])
def test_two_ranks_train_as_with_zero3(job: Path, zero3_losses: list[float], name: str) -> None:
    result, _ = train(job, name)
    assert result["silent"] == []
    assert result["losses"] == pytest.approx(zero3_losses, rel=1e-5)


@pytest.mark.slow
def test_two_nodes_with_a_secondary_shard_each_train_as_with_zero3(
    job: Path, zero3_losses: list[float]
) -> None:
    worker = job / "hpz_worker.py"
    result, output = train(job, "zero3_hpz", ranks=4, worker=worker, zero_hpz_partition_size=2)
    # DeepSpeed trains without hpZ, and the same, where it does not understand the size.
    assert "ranks of a secondary group: 2" in output
    assert result["silent"] == []
    assert result["losses"] == pytest.approx(zero3_losses, rel=1e-5)
