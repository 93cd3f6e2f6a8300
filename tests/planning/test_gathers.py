"""What DeepSpeed really gathers, against the formulas: a test, and the rank of a job that it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from processes import run_ranks
from tiny_models import text_config, vision_config
from training.zero_worker import GLOBAL_BATCH, make_rows, run_config, take
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.distributed import init_process_group, read_world, run_entry
from dehvf_ds.planning.estimate import gathered_elements
from dehvf_ds.planning.memory import Sharding, build_on_meta, count_parameters, passing_bytes

DEEP = 24_000
"""Live elements in the ratio of the shipped configuration to 13B: three layers."""

WHOLE = 1_000_000
"""A window that the whole model fits into."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "live", "reused"),
    [(False, DEEP, DEEP), (True, DEEP, 0), (True, WHOLE, WHOLE), (False, 0, DEEP)],
    ids=["kept", "recomputed", "recomputed within the window", "kept for the distance"],
)
def test_zero3_gathers_and_holds_what_the_formulas_say(
    tmp_path: Path, checkpointing: bool, live: int, reused: int
) -> None:
    text = text_config()
    text.num_hidden_layers = 16
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(tmp_path / "tower")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": reused,
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run_ranks(__file__, [str(tmp_path), json.dumps(checkpointing)], 2)
    found = json.loads((tmp_path / "gathers.json").read_text())
    assert found["planned"] == pytest.approx(found["gathered"], rel=0.05)
    # The formula adds the copy that unpacking makes.
    assert found["planned_live"] - found["copied"] == pytest.approx(found["live"], rel=0.1)


def count_gathers(directory: Path, checkpointing: bool) -> None:
    """A rank: counts a step's gathered elements, and those that are whole at once."""
    import deepspeed.runtime.zero.partition_parameters as partitioning

    from dehvf_ds.training.deepspeed_json import read_deepspeed_json
    from dehvf_ds.training.engine import build_engine, build_model_config
    from dehvf_ds.training.step import train_step

    world = read_world()
    init_process_group(world)
    case = {"micro_batch_size": GLOBAL_BATCH // 2, "activation_checkpointing": checkpointing}
    config = run_config(directory, case)
    ds_config = read_deepspeed_json(str(directory / "ds.json"), config, world.size)
    model_config = build_model_config(config.model)
    parameters = count_parameters(build_on_meta(model_config))
    engine, model = build_engine(config, model_config, ds_config, world)
    frozen: list[Any] = [p for p in model.parameters() if not p.requires_grad]
    gathered = live = 0
    collective = partitioning.dist.allgather_fn

    def counted(output: torch.Tensor, *args, **kwargs):
        nonlocal gathered, live
        done = collective(output, *args, **kwargs)
        gathered += output.numel()
        live = max(live, sum(p.ds_numel for p in frozen if p.ds_status.name != "NOT_AVAILABLE"))
        return done

    partitioning.dist.allgather_fn = counted
    for step in range(3):  # the first one or two learn the order of modules
        gathered = live = 0
        rows = take(make_rows(step, "plain"), world.rank * GLOBAL_BATCH // 2, GLOBAL_BATCH // 2)
        train_step(engine, [rows], world, torch.float32, seed=0, step=step)
    if world.is_main:
        sharding = Sharding.read(ds_config, nodes=1, gpus_per_node=world.size)
        numbers = {
            "gathered": gathered,
            "live": live,
            "copied": parameters.unit,
            # Trainables are gathered too, each once, where none is small enough to stay.
            "planned": parameters.trainable + gathered_elements(parameters, sharding),
            "planned_live": passing_bytes(parameters, sharding)["gathered parameters"] // 4,
        }
        (directory / "gathers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    run_entry(lambda args: count_gathers(Path(args[0]), json.loads(args[1])))
