"""The recipes for LLaMA: they start where they say, and the job script runs what the plan recommends."""

from __future__ import annotations

import re

import pytest
from processes import REPOSITORY

from dehvf_ds.config import RECIPES_DIR, parse_run_config
from dehvf_ds.planning.memory import JSON_NAMES
from dehvf_ds.planning.report import build_plan
from dehvf_ds.planning.time import PlanConfig

LLAMA = sorted(path.stem for path in RECIPES_DIR.glob("*_llama*.yaml"))


def test_these_are_the_recipes() -> None:
    assert LLAMA == ["coco_llama13b", "coco_llama7b", "scienceqa_llama13b", "scienceqa_llama7b"]


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("recipe", LLAMA)
def test_a_llama_recipe_starts(recipe: str, ranks: int) -> None:
    assert parse_run_config(["--config", recipe]).train.accumulation(ranks) == 16 // ranks


@pytest.mark.parametrize("recipe", LLAMA)
def test_the_learning_rate_follows_the_global_batch(recipe: str) -> None:
    train = parse_run_config(["--config", recipe]).train
    assert train.lr == pytest.approx(9e-3 * train.global_batch_size / 256)


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "slurm").glob("train_*.sh")))
def test_a_job_script_starts_and_takes_what_the_plan_recommends(script: str) -> None:
    text = (REPOSITORY / "slurm" / script).read_text(encoding="utf-8")

    def found(pattern: str) -> str:
        match = re.search(pattern, text, flags=re.MULTILINE)
        assert match is not None, pattern
        return match[1]

    place = PlanConfig(
        nodes=int(found(r"^#SBATCH --nodes=(\d+)$")),
        gpus_per_node=int(found(r"^#SBATCH --gpus-per-node=(\d+)$")),
    )
    config = parse_run_config(["--config", found(r"RECIPE:-(\w+)}")])
    config.train.accumulation(place.world)
    chosen = build_plan(config, place).chosen
    assert chosen is not None
    assert found(r"DS_CONFIG:-ds_configs/([\w.]+)}") == JSON_NAMES[chosen.strategy]
