from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dehvf_ds.config import (
    RECIPES_DIR,
    EvalConfig,
    TrainConfig,
    UserError,
    load_run_config,
    parse_eval_config,
    parse_run_config,
    save_run_config,
)

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def test_without_config_the_demo_recipe_is_taken() -> None:
    config = parse_run_config(["--local_rank=1", "--deepspeed", "ds_configs/zero2.json"])
    assert config.run_dir == "runs/demo"
    assert config.deepspeed == "ds_configs/zero2.json"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = parse_run_config(["--train.lr", "1e-3", "--config", "demo", "--model.levels", "[1,2,12]"])
    assert config.train.lr == 1e-3
    assert config.model.levels == (1, 2, 12)


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse_run_config(["--config=demo", "--train.betas", "[0.8, 0.9]", "--seed", "7"])
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses(recipe: str) -> None:
    parse_run_config(["--config", recipe])


def test_the_promised_recipes_are_there() -> None:
    assert {
        "demo",
        "flickr8k",
        "flickr8k_memvp",
        "flickr8k_prefix",
        "flickr8k_none",
        "coco_llama7b",
        "coco_llama13b",
        "scienceqa_llama7b",
        "scienceqa_llama13b",
    } <= set(RECIPES)


@pytest.mark.parametrize("arm", ["memvp", "none", "prefix"])
def test_the_arms_of_flickr8k_differ_in_the_method_alone(arm: str) -> None:
    base, other = (
        yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text()) for name in ("flickr8k", f"flickr8k_{arm}")
    )
    method = {
        key: other["model"].pop(key) for key in ("router", "fusion", "prefix_tokens") if key in other["model"]
    }
    assert method
    assert other.pop("run_dir") != base.pop("run_dir")
    assert other == base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.learning_rate", "1"], "train.learning_rate"),
        (["--train.lr", "fast"], "train.lr"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file in .*, nor a recipe; recipes: coco"),
        (["--train.global_batch_size", "33"], "global_batch_size 33 is not a multiple of"),
        (["--model.router", "token"], "router"),
        (["--model.levels", "[3,2]"], "rising block numbers"),
        (["--train.lr", "-1"], "train.lr is -1; it must be above 0 and at most 100"),
        (["--data.num_workers", "-1"], "num_workers"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_run_config(arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: x\nmodel: {language_model: a, vision_tower: b, depth: 3}\n")
    with pytest.raises(UserError, match="depth"):
        parse_run_config(["--config", str(tmp_path / "c.yaml")])


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: x\nmodel: {language_model: a, vision_tower: b}\n")
    with pytest.raises(UserError, match=r"data\.train"):
        parse_run_config(["--config", str(tmp_path / "c.yaml")])


def test_accumulation_is_derived_from_the_world() -> None:
    config = TrainConfig(global_batch_size=64, micro_batch_size=4)
    assert [config.accumulation(ranks) for ranks in (1, 2, 16)] == [16, 8, 1]


def test_evaluation_flags_are_checked() -> None:
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        parse_eval_config(["--model", "m", "--data", "d", "--batch_size", "0"])


def test_dashes_and_bare_switches_are_taken() -> None:
    given = ["--dry-run", "--init-from", "runs/a", "--train.micro-batch-size=4", "--overwrite"]
    config = parse_run_config(given)
    assert config.dry_run
    assert config.overwrite
    assert config.init_from == "runs/a"
    assert config.train.micro_batch_size == 4
    # A value may hold dashes, and begin with one.
    assert parse_run_config(["--run_dir", "runs/a-b", "--dry_run", "false"]).run_dir == "runs/a-b"
    assert not parse_run_config(["--dry-run", "false"]).dry_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens is larger"),
        ({"num_beams": 0}, "num_beams is 0; it must be"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be"),
    ],
)
def test_an_evaluation_checks_its_decoding(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalConfig(model="m", data="d", **changes)


def test_several_files_and_recipes_go_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {lr: 0.25}\n")
    own = ["--config", str(tmp_path / "c.yaml")]
    assert parse_run_config([*own, "--config", "demo"]) == parse_run_config(["--config", "demo"])
    over = parse_run_config(["--config=demo", *own])
    assert over.train.lr == 0.25
    assert over.data == parse_run_config([]).data


@pytest.mark.parametrize("flag", ["--train.lr+=1", "--model.levels+=1", "--data.prompt+=a"])
def test_nothing_is_added_to_what_is_no_list(flag: str) -> None:
    with pytest.raises(UserError, match=r"adds to a list, and .* is set whole"):
        parse_run_config([flag])
