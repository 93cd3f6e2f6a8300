"""Paths are what a shell would make of them; what is no path of this machine stays as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dehvf_ds.config import (
    EvalConfig,
    GenerateConfig,
    RunConfig,
    UserError,
    expand_flags,
    load_run_config,
    parse_config,
    parse_run_config,
    save_run_config,
)
from dehvf_ds.config.kinds import settings_of
from dehvf_ds.config.paths import expand_path, quote_path

NEEDED = {
    RunConfig: ["--run_dir=r", "--model.language_model=l", "--model.vision_tower=v", "--data.train=d"],
    EvalConfig: ["--model=m", "--data=d"],
    GenerateConfig: ["--model=m", "--prompt=p"],
}
PATHS = [
    (config_class, name)
    for config_class in NEEDED
    for name, setting in settings_of(config_class).items()
    if "path" in (setting.kind.base, *(item.base for item in setting.kind.items))
]


@pytest.fixture(autouse=True)
def _variables(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("IN_HOME", "~/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)


def get(config: object, name: str) -> str:
    for part in name.split("."):
        config = getattr(config, part)
    return config[0] if isinstance(config, list) else config  # pyright: ignore[reportReturnType]


def test_these_settings_are_paths() -> None:
    names = {name for _, name in PATHS}
    assert names >= {
        "run_dir", "deepspeed", "init_from", "resume", "model.language_model", "model.vision_tower",
        "data.train", "data.val", "data.location", "data.cache_dir", "eval.data", "model", "data", "images",
        "references", "output", "image", "language_model", "vision_tower",
    }  # fmt: skip


@pytest.mark.parametrize(("config_class", "name"), PATHS)
def test_every_path_setting_is_expanded_from_flags_and_files(config_class, name: str, tmp_path: Path) -> None:
    for text, expected in (
        ("~/a", "/home/me/a"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}a", "/scratch/mea"),
    ):
        config = parse_config(config_class, [*NEEDED[config_class], f"--{name}={text}"], "")
        assert get(config, name) == expected
        *sections, last = name.split(".")
        value = f"['{text}']" if name == "image" else text
        head = "".join("  " * depth + f"{section}:\n" for depth, section in enumerate(sections))
        (tmp_path / "c.yaml").write_text(head + "  " * len(sections) + f"{last}: {value}\n")
        flags = [flag for flag in NEEDED[config_class] if not flag.startswith(f"--{name}=")]
        config = parse_config(config_class, ["--config", str(tmp_path / "c.yaml"), *flags], "")
        assert get(config, name) == expected
    with pytest.raises(UserError, match=rf"{name} \$NOT_SET/a: the variable \$NOT_SET is not set"):
        parse_config(config_class, [*NEEDED[config_class], f"--{name}=$NOT_SET/a"], "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$IN_HOME/x", "/home/me/data/x"),
        ("a/$SCRATCH", "a//scratch/me"),
        ("~", "/home/me"),
        ("a/~b", "a/~b"),
        ("a$$b", "a$b"),
        ("price$5", "price$5"),
        ("owner/name-7b", "owner/name-7b"),
        ("pipe:aws s3 cp $BUCKET/{} -", "pipe:aws s3 cp $BUCKET/{} -"),
        ("pipe:cat ~/{}", "pipe:cat ~/{}"),
        ("https://host/~me/$x/{}", "https://host/~me/$x/{}"),
        ("s3://b/$x", "s3://b/$x"),
    ],
)
def test_what_is_expanded_and_what_is_not(text: str, expected: str) -> None:
    assert expand_path(text, "data.train") == expected
    assert expand_path(quote_path(expected), "data.train") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$EMPTY/a", r"the variable \$EMPTY is empty"),
        ("${NOT_SET}/a", "not set"),
        ("${}/a", "not set"),
        ("~nobody-of-that-name/a", "no home directory of ~nobody-of-that-name"),
    ],
)
def test_what_cannot_be_expanded_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand_path(text, "run_dir")


def test_a_file_that_a_shell_named_is_taken_as_it_stands(tmp_path: Path) -> None:
    picture = tmp_path / "cost$NOT_SET.jpg"
    picture.touch()
    assert expand_path(str(picture), "image") == str(picture)


def test_the_configuration_file_itself_is_found_by_variable(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_run_config(parse_run_config(["--run_dir=~/r$$1"]), tmp_path / "c.yaml")
    for args in (["--config", "~/c.yaml"], ["--config=$HOME/c.yaml"]):
        assert parse_run_config(args).run_dir == f"{tmp_path}/r$1"
    assert load_run_config(tmp_path / "c.yaml").run_dir == f"{tmp_path}/r$1"


def test_flags_of_the_tools_are_expanded_too() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--verify-data")
    parser.add_argument("--name", default="~")
    args = expand_flags(parser.parse_args(["~/a", "$SCRATCH", "--verify-data", "~/x"]), "verify_data")
    assert args.runs == [Path("/home/me/a"), Path("/scratch/me")]
    assert (args.verify_data, args.name) == ("/home/me/x", "~")
    with pytest.raises(UserError, match=r"--verify-data \$NOT_SET"):
        expand_flags(parser.parse_args(["a", "--verify-data", "$NOT_SET"]), "verify_data")
