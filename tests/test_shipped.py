"""Recipes and DeepSpeed JSONs are found by the names that README and docs give them, from any directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dehvf_ds.config import (
    DEEPSPEED_DIR,
    RECIPES_DIR,
    UserError,
    find_deepspeed_json,
    find_recipe,
    parse_run_config,
)
from dehvf_ds.training.deepspeed_json import read_deepspeed_json

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
JSONS = sorted(path.stem for path in DEEPSPEED_DIR.glob("*.json"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "dehvf_ds/recipes/{}.yaml", "./dehvf_ds/recipes/{}.yaml"])
def test_every_recipe_is_found_from_elsewhere(form: str) -> None:
    assert {find_recipe(form.format(name)) for name in RECIPES} == set(RECIPES_DIR.glob("*.yaml"))


@pytest.mark.parametrize("form", ["{}", "{}.json", "ds_configs/{}.json", "./ds_configs/{}.json"])
def test_every_deepspeed_json_is_found_from_elsewhere(form: str) -> None:
    assert JSONS
    assert {find_deepspeed_json(form.format(name)) for name in JSONS} == set(DEEPSPEED_DIR.glob("*.json"))


def test_a_file_of_the_working_directory_comes_first(elsewhere: Path) -> None:
    (elsewhere / "ds_configs").mkdir()
    (elsewhere / "ds_configs/zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = parse_run_config(["--deepspeed", "ds_configs/zero3.json"])
    assert read_deepspeed_json(config.deepspeed, config, 1)["zero_optimization"]["stage"] == 1
    (elsewhere / "demo.yaml").write_text((RECIPES_DIR / "demo.yaml").read_text() + "seed: 7\n")
    assert parse_run_config(["--config", "demo.yaml"]).seed == 7
    assert parse_run_config(["--config", "demo"]).seed == 0


@pytest.mark.parametrize(
    "given", ["zero4", "other/zero3.json", "/ds_configs/zero3.json", "../zero3.json", ""]
)
def test_another_deepspeed_json_is_refused_with_where_it_was_looked_for(elsewhere: Path, given: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--deepspeed {given}: no such file")) as refused:
        find_deepspeed_json(given)
    assert ", ".join(JSONS) in str(refused.value)
    assert (str(elsewhere) in str(refused.value)) == (not given.startswith("/"))


@pytest.mark.parametrize(
    "given", ["dmeo", "other/demo.yaml", "/recipes/demo.yaml", "ds_configs/demo.yaml", ""]
)
def test_another_recipe_is_refused_with_where_it_was_looked_for(elsewhere: Path, given: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--config {given}: no such file")) as refused:
        parse_run_config(["--config", given])
    assert ", ".join(RECIPES) in str(refused.value)
    assert (str(elsewhere) in str(refused.value)) == (not given.startswith("/"))
