"""From flags and YAML to a checked configuration, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dehvf_ds.config.answers import EvalConfig, GenerateConfig
from dehvf_ds.config.errors import UserError
from dehvf_ds.config.run import RunConfig
from dehvf_ds.config.shipped import find_recipe

ConfigT = TypeVar("ConfigT")

SWITCHES = ("--dry_run", "--overwrite", "--stream")
"""Flags that mean true where no value follows."""


def parse_run_config(args: Sequence[str], default_recipe: str = "demo") -> RunConfig:
    """Parses flags and an optional YAML (``--config``) into a checked configuration.

    Flags win over the file. ``--config`` takes a path or the name of a packaged recipe; without it the
    recipe ``default_recipe`` is taken.

    Raises:
        UserError: unknown key, wrong type, a missing file, values that contradict each other.
    """
    return _parse(RunConfig, _resolve_recipe(args, default_recipe), "Trains DEHVF on DeepSpeed.")


def parse_eval_config(args: Sequence[str]) -> EvalConfig:
    """Parses the flags of ``eval.py``, or a YAML of them. Raises ``UserError`` as ``parse_run_config``."""
    return _parse(EvalConfig, args, "Evaluates a trained DEHVF model.")


def parse_generate_config(args: Sequence[str]) -> GenerateConfig:
    """Parses the flags of ``generate.py``. Raises ``UserError`` as ``parse_run_config``."""
    return _parse(GenerateConfig, args, "Describes pictures with a trained DEHVF model.")


def save_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML that ``--config`` takes back."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")


def load_run_config(path: Path) -> RunConfig:
    """Reads what ``save_run_config`` wrote.

    Raises:
        UserError: the file is missing or is not a run's configuration.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this a run directory?")
    return parse_run_config(["--config", str(path)])


def to_plain(value: Any) -> Any:
    """Turns dataclasses and tuples into dictionaries and lists, for YAML and JSON."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _parse(config_class: type[ConfigT], args: Sequence[str], description: str) -> ConfigT:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; for training also a recipe's name")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; ignored")
    parser.add_class_arguments(config_class)
    try:
        namespace = parser.instantiate(parser.parse_args(_normalized(args)))
    except (ArgumentError, TypeError, yaml.YAMLError) as error:
        raise UserError(" ".join(str(error).split())) from None
    return config_class(**{field.name: namespace[field.name] for field in fields(config_class)})  # pyright: ignore[reportArgumentType]


def _normalized(args: Sequence[str]) -> list[str]:
    """Takes ``--dry-run`` for ``--dry_run true``: dashes in names, and a switch without a value."""
    result: list[str] = []
    for number, arg in enumerate(args):
        if not arg.startswith("--"):
            result.append(arg)
            continue
        name, separator, value = arg.partition("=")
        name = "--" + name.removeprefix("--").replace("-", "_")
        result.append(name + separator + value)
        bare = not separator and (number + 1 == len(args) or args[number + 1].startswith("--"))
        if bare and name in SWITCHES:
            result[-1] = f"{name}=true"
    return result


def _resolve_recipe(args: Sequence[str], default_recipe: str) -> list[str]:
    """Puts the recipe's path in the place of its name, and the default recipe where none is named."""
    resolved = list(args)
    for i, arg in enumerate(resolved):
        name = arg.removeprefix("--config=") if arg.startswith("--config=") else None
        if arg == "--config" and i + 1 < len(resolved):
            resolved[i + 1] = str(find_recipe(resolved[i + 1]))
            return resolved
        if name is not None:
            resolved[i] = f"--config={find_recipe(name)}"
            return resolved
    return ["--config", str(find_recipe(default_recipe)), *resolved]
