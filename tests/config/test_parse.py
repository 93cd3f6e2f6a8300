"""Flags and YAML as people write them: no text or number changes, and mistakes are refused in one line."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dehvf_ds.config import (
    EvalConfig,
    GenerateConfig,
    RunConfig,
    TrainConfig,
    UserError,
    expand_flags,
    ignored_settings,
    load_run_config,
    parse_config,
    parse_eval_config,
    parse_generate_config,
    parse_run_config,
    save_run_config,
    settings_of,
)
from dehvf_ds.config.parse import WITHOUT_EFFECT
from dehvf_ds.config.settings import ModelConfig
from dehvf_ds.model.configuration import ROUTERS
from dehvf_ds.planning.estimate import PlanConfig

BASE = """\
run_dir: runs/x
model:
  language_model: llm
  vision_tower: tower
data:
  train: shards
"""
TEXTS = [
    "# x", "#1 caption", "yes", "no", "on", "null", "~", "Null", "1e-3", "a: b", "[x]", "{x: 1}", "1_000",
    "08", "2020-01-01", "12:30", "-x", "true", "'q'", '"q"', "None", "- a", "x # y", "a\nb", "@x", "%x", "&a",
    "*b", "!t x", "|", ">", ".inf", "0x10", " x ", "", "ü", "--x", "a=b", "\\n", "{}", "?", "<<", "=",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _variables(monkeypatch) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch/me", "UP": "~/data", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOT_SET", raising=False)


def parse(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_run_config(["--config", str(path)])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_given(text: str, tmp_path: Path) -> None:
    config = parse_run_config(["--config=demo", f"--data.prompt={text}"])
    assert config.data.prompt == text
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    lr=st.floats(1e-300, 100),
    name=st.text("abc $~{}#:.'", min_size=1, max_size=12).map(lambda text: f"{text}/{text}e"),
)
def test_what_is_saved_reads_back_equal(tmp_path_factory, prompt: str | None, lr: float, name: str) -> None:
    base = parse_run_config(["--config=demo"])
    data, model = replace(base.data, prompt=prompt, train=name), replace(base.model, feature_layers=(1, 3))
    config = replace(base, run_dir=name, data=data, model=model, train=replace(base.train, lr=lr))
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_run_config(config, path)
    # `./~` is the same place as `~`, where no home directory is meant.
    same = name if not name.startswith("~") else f"./{name}"
    assert load_run_config(path) == replace(config, run_dir=same, data=replace(data, train=same))


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("train.lr: 1e-3", "train.lr", 1e-3),
        ("train.warmup_steps: 010", "train.warmup_steps", 10),
        ("train.warmup_steps: 1e3", "train.warmup_steps", 1000),
        ("train.betas: [.8, 9e-1]", "train.betas", (0.8, 0.9)),
        ("model.feature_layers: 1, 3", "model.feature_layers", (1, 3)),
        ("train.activation_checkpointing: yes", "train.activation_checkpointing", True),
        ("train.steps:", "train.steps", None),
        ("train:\n  # steps: 4\neval:", "train.steps", None),
        ("data.prompt: yes", "data.prompt", "yes"),
        ("data.prompt: 'null'", "data.prompt", "null"),
        ("data.prompt: null", "data.prompt", None),
        ("data.prompt: '#1'", "data.prompt", "#1"),
        ("resume: never  # not now", "resume", "never"),
    ],
)
def test_a_value_in_a_file_is_what_its_setting_takes(tmp_path: Path, written: str, name: str, value) -> None:
    model = BASE.partition("model:")[0] + "model.language_model: llm\nmodel.vision_tower: tower\n"
    found = attrgetter(name)(parse(tmp_path, f"\ufeff{model}data.train: shards\n{written}\n"))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("run_dir: y\n", "run_dir is set twice, in lines 1 and 7"),
        ("train: {lr: 0.1}\ntrain.lr: 0.5\n", "train.lr is set twice, in lines 7 and 8"),
        ("eval: {}\neval: {}\n", "eval is set twice, in lines 7 and 8"),
        ("train: {lr: fast}\n", "line 7: train.lr is 'fast'"),
        ("train: 3\n", "line 7: train must hold"),
        ("train: {lr: {a: 1}}\n", "train.lr: not one plain value"),
        ("resume: #1\n", "line 7: resume has no value, since # begins a comment"),
        ("lr: 1\n", "line 7: no setting lr; did you mean train.lr?"),
        ("train: {levels_every: 1}\n", "line 7: no setting train.levels_every; it is train.router_every now"),
        ("train: {steps: 1\n", "line 8"),
    ],
)
def test_a_file_is_refused_in_one_line_with_its_place(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(tmp_path, BASE + more)
    assert message in str(error.value)
    assert str(tmp_path / "c.yaml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 2000, b"text\n", None])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_run_config(tmp_path / "c.yaml")


def test_of_files_recipes_and_flags_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 7, lr: 0.25}\n")
    own = ["--config", str(tmp_path / "c.yaml")]
    assert parse_run_config([]) == parse_run_config(["--config", "demo"])
    assert parse_run_config([*own, "--config", "demo"]).train.lr == parse_run_config([]).train.lr
    over = parse_run_config(["--train.lr", "2", "--config=demo", *own, "--train.lr", "3", "--local_rank=1"])
    assert (over.train.steps, over.train.lr) == (7, 3)


def test_switches_dashes_and_lists_are_taken() -> None:
    config = parse_run_config(
        ["--dry-run", "--init-from", "runs/a-b", "--train.micro-batch-size=4", "--overwrite", "false"]
    )
    assert (config.dry_run, config.overwrite, config.init_from) == (True, False, "runs/a-b")
    assert config.train.micro_batch_size == 4
    assert parse_run_config(["--train.steps=3", "--train.steps=null"]).train.steps is None
    assert parse_run_config(
        ["--train.betas", "[0.8, 0.9]", "--model.feature_layers=1,2"]
    ).model.feature_layers == (1, 2)
    images = ["--image", "a.jpg", "b c.jpg", "--choices=[x, y]", "--image", "d.jpg", "--choices=-1"]
    answers = parse_generate_config(["--model=m", *images])
    assert (answers.image, answers.choices) == (["a.jpg", "b c.jpg", "d.jpg"], ["[x, y]", "-1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lr"], "--train.lr: expected one argument"),
        (["--data.prompt", "--seed", "1"], "--NAME=VALUE"),
        (["caption"], "caption: no such flag"),
        (["--lr", "1"], "--lr: no such flag; did you mean train.lr?"),
        (["--dry-run", "maybe"], "--dry_run is 'maybe'; it should be a valid boolean"),
        (["--model.router", "token"], "--model.router is 'token'; it should be 'layer', 'static' or 'last'"),
        (["--run_dir="], "--run_dir is ''; it should be a path"),
        (["--model.feature_layers", "[3,2]"], "rising block numbers"),
        (["--model.fusion=none", "--model.lora.rank=0"], "leaves nothing to train"),
    ],
)
def test_flags_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run_config(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
def test_zero_is_a_value_where_it_means_something(config_class: type, name: str) -> None:
    flag = f"--{name}={'0, 0' if name == 'train.betas' else 0}"
    expected = nullcontext() if name in MAY_BE_ZERO.split() else pytest.raises(UserError, match=name)
    with expected:
        parse_config(config_class, [*NEEDED[config_class], flag], "")


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
def test_every_number_has_a_range(config_class: type, name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ["-1", "nan", ".NaN", "-.inf", "Infinity", "1e400", "1e12", "9" * 40, "true", "", "x"]:
        text = f"{text}, 0.9" if name == "train.betas" else text
        path.write_text(f"{name}: '{text}'\n")
        for flags, place in ([f"--{name}={text}"], f"--{name}"), (["--config", str(path)], f"{path}, line 1"):
            with pytest.raises(UserError) as error:
                parse_config(config_class, [*NEEDED[config_class], *flags], "")
            told = str(error.value)
            # A list of feature layers may also fail the check that they rise.
            assert place in told or name == "model.feature_layers"
            assert name in told
            assert "\n" not in told


@pytest.mark.parametrize(
    "values", [{"lr": float("nan")}, {"steps": 1.5}, {"betas": (0.9, 1.0)}, {"learning": 1}]
)
def test_a_configuration_made_in_python_is_checked_too(values: dict) -> None:
    assert len(NUMBERS) > 45
    with pytest.raises(ValidationError, match=next(iter(values))):
        TrainConfig(**values)


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: no value; give --data\.train, or set it in the file"):
        parse(tmp_path, BASE.partition("data:")[0])
    with pytest.raises(UserError, match="min_new_tokens is larger"):
        parse_eval_config(["--model=m", "--data=d", "--max_new_tokens=3", "--min_new_tokens=4"])


def test_help_tells_every_setting(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_run_config(["--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "hypotheses of beam search; 1 is greedy (default: 1)" in told
    for name, setting in {**settings_of(RunConfig), **settings_of(EvalConfig)}.items():
        assert setting.description, name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "train.micro_batch_size 8 is not a multiple of data.captions_together 3"),
        (
            "--train.micro_batch_size=6 --data.captions=one",
            "data.captions_together 3 needs data.captions all",
        ),
        ("--train.micro_batch_size=6 --train.global_batch_size=18", None),
    ],
)
def test_captions_that_stay_together_fill_micro_batches(flags: str, message: str | None) -> None:
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        parse_run_config(["--config=demo", "--data.captions_together=3", *flags.split()])


def test_accumulation_is_derived_from_the_world() -> None:
    config = TrainConfig(global_batch_size=64, micro_batch_size=4)
    assert [config.accumulation(ranks) for ranks in (1, 2, 16)] == [16, 8, 1]
    with pytest.raises(UserError, match="4 x 3 ranks"):
        config.accumulation(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~/a$$b", "/home/me/a$b"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}a", "/scratch/mea"),
        ("$UP/x", "/home/me/data/x"),
        ("~", "/home/me"),
        ("a/~b", "a/~b"),
        ("owner/name-7b", "owner/name-7b"),
        ("pipe:aws s3 cp $BUCKET/{} -", "pipe:aws s3 cp $BUCKET/{} -"),
        ("https://host/~me/$x/{}", "https://host/~me/$x/{}"),
        *((wrong, None) for wrong in ("$EMPTY/a", "${NOT_SET}/a", "${}/a", "cost$5", "~no-such-user/a", " ")),
    ],
)
def test_paths_of_flags_and_files_are_expanded_once(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data.location: '{text}'\n")
    for flags in ([f"--data.location={text}"], ["--config", str(tmp_path / "c.yaml")]):
        if expected is None:
            with pytest.raises(UserError, match=r"data\.location is .*; "):
                parse_run_config(["--config=demo", *flags])
        else:
            config = parse_run_config(["--config=demo", *flags])
            assert replace(config, seed=1).data.location == expected
    assert parse_generate_config(["--model=$SCRATCH", "--image", "~/a"]).image == ["/home/me/a"]


def test_flags_of_the_tools_are_expanded_too(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--verify-data")
    (picture := tmp_path / "cost$NOT_SET.jpg").touch()
    args = expand_flags(parser.parse_args(["~/a", str(picture), "--verify-data", "$SCRATCH"]), "verify_data")
    assert args.runs == [Path("/home/me/a"), picture]
    assert args.verify_data == "/scratch/me"
    with pytest.raises(UserError, match=r"--verify-data \$NOT_SET"):
        expand_flags(parser.parse_args(["a", "--verify-data", "$NOT_SET"]), "verify_data")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--model.fusion=none --model.rank=8", "model.rank 8 has no effect: model.fusion is none"),
        ("--model.router=last --model.router_dim=8", "model.router_dim 8 has no effect: model.router is"),
        ("--data.scienceqa.lecture", "data.scienceqa.lecture True has no effect: data.task is caption"),
        ("--train.validate_every=3", "train.validate_every 3 has no effect: data.val is None"),
        ("--resume=runs/a --init_from=b", "init_from b has no effect: resume is runs/a"),
    ],
)
def test_a_setting_without_effect_is_told(flags: str, line: str) -> None:
    (told,) = ignored_settings(parse_run_config(["--config", "demo", *flags.split()]))
    assert told.startswith(line)
    assert {name for _, _, names in WITHOUT_EFFECT for name in names.split()} <= settings_of(RunConfig).keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reading=likelihood", "reading likelihood is ScienceQA's"),
        ("--image_captions=true", "image_captions is for task scienceqa"),
        ("--images=x", "images needs data to be an annotation file"),
        ("--task=scienceqa --references=x.json", "references is for task caption"),
    ],
)
def test_flags_that_an_evaluation_would_ignore_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_eval_config(["--model=m", "--data=d", *flags.split()])


def test_the_settings_know_the_models_routers() -> None:
    assert get_args(get_type_hints(ModelConfig)["router"]) == ROUTERS
