"""Recipes and DeepSpeed JSONs are found by the names that README and docs give them, from any directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dehvf_ds.config import (
    DEEPSPEED_DIR,
    RECIPES_DIR,
    UserError,
    find_deepspeed_json,
    find_recipe,
    parse_run_config,
)
from dehvf_ds.training.deepspeed_json import read_deepspeed_json

RECIPES = {path.stem for path in RECIPES_DIR.glob("*.yaml")}
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
    suffix = pattern.removeprefix("*")
    for given in ("dmeo", f"other/demo{suffix}", f"/ds_configs/zero3{suffix}", f"../zero3{suffix}", ""):
        with pytest.raises(UserError, match=re.escape(f" {given}: no such file")) as refused:
            find(given)
        assert ", ".join(sorted(path.stem for path in files)) in str(refused.value)
        assert (str(Path.cwd()) in str(refused.value)) == (not given.startswith("/"))


def test_a_file_of_the_working_directory_comes_first(elsewhere: Path) -> None:
    (elsewhere / "ds_configs").mkdir()
    (elsewhere / "ds_configs/zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = parse_run_config(["--deepspeed", "ds_configs/zero3.json"])
    assert read_deepspeed_json(config.deepspeed, config, 1)["zero_optimization"]["stage"] == 1
    (elsewhere / "demo.yaml").write_text((RECIPES_DIR / "demo.yaml").read_text() + "seed: 7\n")
    assert parse_run_config(["--config", "demo.yaml"]).seed == 7
    assert parse_run_config(["--config", "demo"]).seed == 0


def test_the_promised_recipes_are_there() -> None:
    assert {"demo", "flickr8k", "flickr8k_memvp", "flickr8k_prefix", "flickr8k_none"} <= RECIPES


@pytest.mark.parametrize("arm", ["memvp", "none", "prefix"])
def test_the_arms_of_flickr8k_differ_in_the_method_alone(arm: str) -> None:
    base, other = (
        yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text()) for name in ("flickr8k", f"flickr8k_{arm}")
    )
    assert [other["model"].pop(key, None) for key in ("router", "fusion", "prefix_tokens")] != [None] * 3
    assert other.pop("run_dir") != base.pop("run_dir")
    assert other == base
