"""Recipes, DeepSpeed JSONs and job scripts: found by their documented names, and right in what they set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from processes import REPOSITORY

from dehvf_ds.config import (
    DEEPSPEED_DIR,
    RECIPES_DIR,
    UserError,
    find_deepspeed_json,
    find_recipe,
    ignored_settings,
    parse_run_config,
)
from dehvf_ds.planning.estimate import PlanConfig
from dehvf_ds.planning.memory import JSON_NAMES
from dehvf_ds.planning.plan import build_plan
from dehvf_ds.training.deepspeed_json import read_deepspeed_json

RECIPES = {path.stem for path in RECIPES_DIR.glob("*.yaml")}
LLAMA = [path.stem for path in sorted(RECIPES_DIR.glob("*_llama*.yaml"))]
KINDS = [
    (find_recipe, RECIPES_DIR, "*.yaml", ("{}", "{}.yaml", "dehvf_ds/recipes/{}.yaml", "./recipes/{}.yaml")),
    (find_deepspeed_json, DEEPSPEED_DIR, "*.json", ("{}", "{}.json", "ds_configs/{}.json")),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("find", "directory", "pattern", "forms"), KINDS)
def test_shipped_files_are_found_from_elsewhere(find, directory: Path, pattern: str, forms) -> None:
    files = set(directory.glob(pattern))
    assert files
    for form in forms:
        assert {find(form.format(path.stem)) for path in files} == files
    for name in ("dmeo", "/ds_configs/zero3.json", "../zero3.yaml"):
        with pytest.raises(UserError, match=re.escape(f" {name}: no such file")) as refused:
            find(name)
        assert ", ".join(sorted(path.stem for path in files)) in str(refused.value)
        assert (str(Path.cwd()) in str(refused.value)) == (not name.startswith("/"))


def test_a_file_of_the_working_directory_comes_first(elsewhere: Path) -> None:
    (elsewhere / "ds_configs").mkdir()
    (elsewhere / "ds_configs/zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = parse_run_config(["--deepspeed", "ds_configs/zero3.json"])
    assert read_deepspeed_json(config.deepspeed, config, 1)["zero_optimization"]["stage"] == 1
    (elsewhere / "demo.yaml").write_text((RECIPES_DIR / "demo.yaml").read_text() + "seed: 7\n")
    assert parse_run_config(["--config", "demo.yaml"]).seed == 7
    assert parse_run_config(["--config", "demo"]).seed == 0


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_has_no_setting_without_effect(recipe: str) -> None:
    assert ignored_settings(parse_run_config(["--config", recipe])) == []


@pytest.mark.parametrize("arm", ["memvp", "none", "prefix"])
def test_the_arms_of_flickr8k_differ_in_the_method_alone(arm: str) -> None:
    base, other = (
        yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text()) for name in ("flickr8k", f"flickr8k_{arm}")
    )
    assert [other["model"].pop(key, None) for key in ("router", "fusion", "prefix_tokens")] != [None] * 3
    assert other.pop("run_dir") != base.pop("run_dir")
    assert other == base


@pytest.mark.parametrize("recipe", LLAMA)
def test_a_llama_recipe_starts_and_its_learning_rate_follows_the_global_batch(recipe: str) -> None:
    train = parse_run_config(["--config", recipe]).train
    assert [train.accumulation(ranks) for ranks in (8, 16)] == [2, 1]
    # What MemVP and ADEM-VL take at their batch of 32; at others by the root, in two digits.
    growth = (train.global_batch_size / 32) ** 0.5
    assert train.lr == (1.125e-3 if growth == 1 else pytest.approx(float(f"{1.125e-3 * growth:.1e}")))


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
