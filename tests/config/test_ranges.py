"""Every numeric setting states its range, and what lies outside is one line that names it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from dehvf_ds.config import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UserError,
    parse_config,
    parse_run_config,
)
from dehvf_ds.config.kinds import settings_of
from dehvf_ds.planning.time import PlanConfig

NEEDED = {
    RunConfig: ["--config", "demo"],
    EvalConfig: ["--model", "m", "--data", "d"],
    GenerateConfig: ["--model", "m", "--prompt", "p"],
    PlanConfig: [],
}
NUMBERS = {
    (config_class, name): setting.kind
    for config_class in NEEDED
    for name, setting in settings_of(config_class).items()
    if setting.kind.base in ("int", "float") or (setting.kind.items and setting.kind.items[0].range)
}
ZERO_IS_A_VALUE = {
    "data.augment.flip",
    "data.bucket_steps",
    "data.max_bad_share",
    "data.num_workers",
    "data.val_samples",
    "eval.every_steps",
    "min_new_tokens",
    "model.lora.dropout",
    "model.lora.rank",
    "overhead_gib",
    "seed",
    "train.betas",
    "train.eval_every",
    "train.levels_every",
    "train.max_grad_norm",
    "train.min_lr_ratio",
    "train.save_every",
    "train.warmup_steps",
    "train.weight_decay",
}
WRONG = [
    "-1",
    "nan",
    ".NaN",
    "inf",
    "-.inf",
    "Infinity",
    "1e400",
    "1e12",
    "9" * 40,
    "true",
    "yes",
    "",
    "x",
    "1,5,9",
]


def parse(config_class: type, name: str, text: str) -> object:
    if "betas" in name:
        text = f"[{text}, 0.9]"
    given = [*NEEDED[config_class], f"--{name}={text}"]
    return (
        parse_run_config if config_class is RunConfig else lambda args: parse_config(config_class, args, "")
    )(given)


def test_the_settings_are_found() -> None:
    names = {name for _, name in NUMBERS}
    assert {"train.lr", "train.betas", "model.levels", "model.lora.alpha", "gpus_per_node", "seed"} <= names
    assert len(NUMBERS) > 50


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
def test_a_number_outside_its_range_is_one_line_that_names_it(config_class: type, name: str) -> None:
    kind = NUMBERS[config_class, name]
    assert (kind.items[0] if kind.items else kind).range is not None
    wrong = list(WRONG) if name in ZERO_IS_A_VALUE else ["0", "0.0", *WRONG]
    for text in wrong:
        if name == "model.levels" and text == "1,5,9":
            continue
        with pytest.raises(UserError) as error:
            parse(config_class, name, text)
        assert name in str(error.value), text
        assert "\n" not in str(error.value)
    if name in ZERO_IS_A_VALUE:
        parse(config_class, name, "0")


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
def test_a_file_gives_the_same_refusals_as_flags(config_class: type, name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    *sections, last = name.split(".")
    for text in ("-1", ".nan", ".inf", "true", "1e12"):
        line = f"[{text}, 0.9]" if "betas" in name else f"[{text}]" if name == "model.levels" else text
        head = "".join("  " * depth + f"{section}:\n" for depth, section in enumerate(sections))
        path.write_text(head + "  " * len(sections) + f"{last}: {line}\n")
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            parse_config(config_class, ["--config", str(path)], "")


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (TrainConfig, {"lr": float("nan")}, "train.lr is nan"),
        (TrainConfig, {"steps": True}, "train.steps is True, not a whole number"),
        (TrainConfig, {"steps": 1.5}, "train.steps is 1.5, not a whole number"),
        (TrainConfig, {"betas": (0.9, 1.0)}, "train.betas is 1; it must be at least 0 and below 1"),
        (TrainConfig, {"micro_batch_size": 0, "global_batch_size": 0}, "train.global_batch_size is 0"),
        (LoraConfig, {"alpha": 0.0}, r"model.lora.alpha is 0; it must be above 0"),
        (AugmentConfig, {"min_crop": 1e-9}, r"data.augment.min_crop is 1e-09"),
        (DataConfig, {"train": "d", "max_tokens": 1}, r"data.max_tokens is 1; it must be at least 8"),
        (ModelConfig, {"language_model": "a", "vision_tower": "b", "levels": (0, 1)}, r"model.levels is 0"),
    ],
)
def test_a_configuration_made_in_python_is_checked_too(
    config_class: type, values: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_class(**values)


def test_whole_numbers_may_be_written_with_an_exponent_and_others_may_not_have_a_rest() -> None:
    assert parse_run_config(["--train.steps", "1e3"]).train.steps == 1000
    assert parse_run_config(["--train.steps", "08"]).train.steps == 8
    assert parse_run_config(["--train.epochs", "2"]).train.epochs == 2.0
    with pytest.raises(UserError, match=r"train\.steps is 1\.5, not a whole number"):
        parse_run_config(["--train.steps", "1.5"])


def test_a_number_without_a_range_is_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Bare:
        size: int = 1

    from dehvf_ds.config.kinds import check_ranges

    assert [field.name for field in fields(Bare)] == ["size"]
    with pytest.raises((AssertionError, NameError)):
        check_ranges(Bare())
