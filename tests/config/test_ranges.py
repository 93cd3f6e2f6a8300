"""Every numeric setting has a range, and a value outside it ends in one line that names it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from dehvf_ds.config import (
    EvalConfig,
    GenerateConfig,
    RunConfig,
    TrainConfig,
    UserError,
    parse_config,
    settings_of,
)
from dehvf_ds.planning.estimate import PlanConfig

NEEDED = {
    RunConfig: ["--run_dir=r", "--model.language_model=l", "--model.vision_tower=v", "--data.train=d"],
    EvalConfig: ["--model=m", "--data=d"],
    GenerateConfig: ["--model=m", "--prompt=p"],
    PlanConfig: [],
}
NUMBERS = [
    (config_class, name)
    for config_class in NEEDED
    for name, setting in settings_of(config_class).items()
    if re.search(r"\b(int|float)\b", str(setting.annotation))
]
MAY_BE_ZERO = """
data.augment.flip data.bucket_steps data.max_bad_share data.num_workers data.val_samples eval.every_steps
min_new_tokens model.lora.dropout model.lora.rank overhead_gib seed train.betas train.validate_every
train.router_every train.max_grad_norm train.min_lr_ratio train.save_every train.warmup_steps
train.weight_decay
"""
ZERO_IS_A_VALUE = set(MAY_BE_ZERO.split())
WRONG = ["-1", "nan", ".NaN", "inf", "-.inf", "Infinity", "1e400", "1e12", "9" * 40, "true", "yes", "", "x"]
WRONG += ["1,5,9"]


def test_the_settings_are_found() -> None:
    names = {name for _, name in NUMBERS}
    assert names >= ZERO_IS_A_VALUE | {"train.lr", "model.feature_layers", "model.lora.alpha", "num_beams"}
    assert len(NUMBERS) > 45


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
def test_a_number_outside_its_range_is_one_line_that_names_it(
    config_class: type, name: str, tmp_path: Path
) -> None:
    path, needed = tmp_path / "c.yaml", NEEDED[config_class]
    zeros = ["0", "0.0"]
    wrong = WRONG + (zeros if name not in ZERO_IS_A_VALUE else [])
    for text in wrong:
        if text == "1,5,9" and name == "model.feature_layers":
            continue
        text = f"[{text}, 0.9]" if name == "train.betas" else text
        path.write_text(f"{name}: {json.dumps(text)}\n")
        for given, place in ([f"--{name}={text}"], f"--{name}"), (["--config", str(path)], f"{path}, line 1"):
            with pytest.raises(UserError) as error:
                parse_config(config_class, [*needed, *given], "")
            assert name in str(error.value), text
            assert place in str(error.value) or name == "model.feature_layers", text
            assert "\n" not in str(error.value)
    if name in ZERO_IS_A_VALUE:
        parse_config(config_class, [*needed, f"--{name}={'0, 0' if name == 'train.betas' else 0}"], "")


@pytest.mark.parametrize(
    "values",
    [{"lr": float("nan")}, {"steps": 1.5}, {"betas": (0.9, 1.0)}, {"micro_batch_size": 0}, {"learning": 1}],
)
def test_a_configuration_made_in_python_is_checked_too(values: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        TrainConfig(**values)
