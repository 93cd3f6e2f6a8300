"""A setting that has no effect is told; one that leaves nothing to train is refused."""

from __future__ import annotations

import pytest

from dehvf_ds.config import RECIPES_DIR, UserError, parse_run_config
from dehvf_ds.config.ignored import _RULES, ignored_settings
from dehvf_ds.config.kinds import settings_of
from dehvf_ds.config.run import RunConfig


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_a_recipe_has_no_idle_setting(recipe: str) -> None:
    assert ignored_settings(parse_run_config(["--config", recipe])) == []


def test_the_rules_name_settings() -> None:
    assert {name for names, _, _ in _RULES for name in names} <= settings_of(RunConfig).keys()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model.prefix_tokens", "16"], "model.prefix_tokens 16 has no effect: model.fusion is not prefix"),
        (
            ["--model.fusion", "none", "--model.rank", "8"],
            "model.rank 8 has no effect: model.fusion is not ffn",
        ),
        (
            ["--model.router", "last", "--model.router_dim", "8"],
            "model.router_dim 8 has no effect: model.router",
        ),
        (
            ["--model.levels", "[1]", "--model.num_levels", "2"],
            "model.num_levels 2 has no effect: model.levels",
        ),
        (["--model.lora.rank", "0", "--model.lora.alpha", "2"], "model.lora.alpha 2.0 has no effect"),
        (
            ["--data.task", "chat", "--data.prompt", "Say:"],
            "data.prompt Say: has no effect: data.task is not",
        ),
        (["--data.scienceqa.lecture"], "data.scienceqa.lecture True has no effect"),
        (["--data.cache_gb", "3"], "data.cache_gb 3.0 has no effect: data.cache_dir is not set"),
        (["--train.eval_every", "3"], "train.eval_every 3 has no effect: data.val is not set"),
        (["--eval.num_beams", "3"], "eval.num_beams 3 has no effect: eval.every_steps is 0"),
    ],
)
def test_an_idle_setting_is_told(flags: list[str], line: str) -> None:
    (told,) = ignored_settings(parse_run_config(["--config", "demo", *flags]))
    assert told.startswith(line)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.fusion none with model\.lora\.rank 0 leaves nothing to train"
    ):
        parse_run_config(["--config", "demo", "--model.fusion", "none", "--model.lora.rank", "0"])
