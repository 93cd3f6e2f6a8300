"""From flags and YAML to a checked configuration, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dehvf_ds.config.answers import EvalConfig, GenerateConfig
from dehvf_ds.config.errors import UserError
from dehvf_ds.config.kinds import Setting, sections_of, settings_of
from dehvf_ds.config.paths import expand_path, quote_path
from dehvf_ds.config.run import RunConfig
from dehvf_ds.config.shipped import find_recipe
from dehvf_ds.config.values import flag_value
from dehvf_ds.config.yaml_file import read_settings, suggestion

ConfigT = TypeVar("ConfigT")

HELP_FLAG = "--help"
CONFIG_FLAG = "--config"
IGNORED_FLAG = "--local_rank"
"""Set by the deepspeed launcher."""


def parse_run_config(args: Sequence[str], default_recipe: str = "demo") -> RunConfig:
    """Parses flags and an optional YAML (``--config``) into a checked configuration.

    Flags win over the file. ``--config`` takes a path or the name of a packaged recipe; without it the
    recipe ``default_recipe`` is taken.

    Raises:
        UserError: unknown key, wrong type, a missing file, values that contradict each other.
    """
    return parse_config(
        RunConfig, _resolve_recipe(_with_config_paths(args), default_recipe), "Trains DEHVF on DeepSpeed."
    )


def parse_eval_config(args: Sequence[str]) -> EvalConfig:
    """Parses the flags of ``eval.py``, or a YAML of them. Raises ``UserError`` as ``parse_run_config``."""
    return parse_config(EvalConfig, _with_config_paths(args), "Evaluates a trained DEHVF model.")


def parse_generate_config(args: Sequence[str]) -> GenerateConfig:
    """Parses the flags of ``generate.py``. Raises ``UserError`` as ``parse_run_config``."""
    return parse_config(
        GenerateConfig, _with_config_paths(args), "Describes pictures with a trained DEHVF model."
    )


def save_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML that ``--config`` takes back."""
    plain = to_plain(config)
    for name, setting in settings_of(RunConfig).items():
        if setting.kind.base == "path":
            *sections, last = name.split(".")
            section = plain
            for part in sections:
                section = section[part]
            if section[last] is not None:
                section[last] = quote_path(section[last])
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_run_config(path: Path) -> RunConfig:
    """Reads what ``save_run_config`` wrote.

    Raises:
        UserError: the file is missing or is not a run's configuration.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this a run directory?")
    return _build(RunConfig, read_settings(path, settings_of(RunConfig)))


def to_plain(value: Any) -> Any:
    """Turns dataclasses and tuples into dictionaries and lists, for YAML and JSON."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def parse_config(config_class: type[ConfigT], args: Sequence[str], description: str) -> ConfigT:
    """Parses flags, and the files of ``--config`` before them, into a checked configuration.

    Args:
        config_class: a dataclass whose annotations say what its settings take (``kinds.py``).
        args: ``--name value`` or ``--name=value``, names with dots, dashes for underscores; a switch needs no
            value; ``--name+=value`` adds to a list. Of a flag given twice the last counts.
        description: begins the help.

    Raises:
        UserError: an unknown name, a value that the setting does not take, or none where one is needed.
    """
    settings = settings_of(config_class)
    from_files: dict[str, Any] = {}
    from_flags: dict[str, Any] = {}
    for flag, name, text, adds in _flags(args, settings):
        if flag == HELP_FLAG:
            _print_help(settings, description)
            sys.exit(0)
        if flag == CONFIG_FLAG:
            from_files |= read_settings(Path(text), settings)
        elif flag != IGNORED_FLAG:
            value = flag_value(settings[name].kind, text, flag)
            from_flags[name] = [*from_flags.get(name, []), *value] if adds else value
    return _build(config_class, from_files | from_flags)


def _build(config_class: type[ConfigT], given: Mapping[str, Any]) -> ConfigT:
    for name, setting in settings_of(config_class).items():
        if setting.required and name not in given:
            raise UserError(f"{name}: no value; give --{name}, or set it in the file of {CONFIG_FLAG}")
    return _section(config_class, given, "")


def _section(config_class: type[ConfigT], given: Mapping[str, Any], prefix: str) -> ConfigT:
    sections = dict(sections_of(config_class))
    values = {}
    for field in fields(config_class):  # pyright: ignore[reportArgumentType]
        name = prefix + field.name
        if field.name in sections:
            values[field.name] = _section(sections[field.name], given, name + ".")
        elif name in given:
            values[field.name] = given[name]
    return config_class(**values)


def _flags(args: Sequence[str], settings: Mapping[str, Setting]) -> Iterator[tuple[str, str, str, bool]]:
    """Yields each flag as written, its setting's name, its text, and whether it adds to a list."""
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", HELP_FLAG):
            yield HELP_FLAG, "", "", False
            continue
        if not arg.startswith("--") or arg == "--":
            raise UserError(
                f"{arg!r}: a value without a flag before it; put quotes around a text with spaces"
            )
        flag, equals, text = arg.partition("=")
        adds = bool(equals) and flag.endswith("+")
        name = flag.removesuffix("+").removeprefix("--").replace("-", "_")
        flag = "--" + name
        if flag not in (CONFIG_FLAG, IGNORED_FLAG):
            if name not in settings:
                raise UserError(f"{flag}: no such flag{suggestion(name, settings)}")
            kind = settings[name].kind
            if adds and (kind.base != "list" or kind.is_tuple):
                raise UserError(f"{flag}+= adds to a list, and {flag} is set whole: write {flag}={text}")
            if not equals and kind.base == "bool" and (not rest or rest[0].startswith("--")):
                text, equals = "true", "="
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag} needs a value; one that begins with -- is written {flag}=--...")
            text = rest.pop(0)
        yield flag, name, text, adds


def _print_help(settings: Mapping[str, Setting], description: str) -> None:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(CONFIG_FLAG, metavar="FILE", help="a YAML file; for training also a recipe's name")
    for setting in settings.values():
        kind = setting.kind
        shown = "/".join(kind.choices) if kind.choices else kind.base.upper()
        default = "needed" if setting.required else f"default: {setting.default}"
        text = f"{setting.help} ({default})".replace("%", "%%")
        parser.add_argument(f"--{setting.name}", metavar=shown, help=text)
    parser.print_help()


def _with_config_paths(args: Sequence[str]) -> list[str]:
    """Expands ``~`` and variables in what ``--config`` names, before recipes are looked for."""
    expanded = list(args)
    for number, arg in enumerate(expanded):
        if arg == CONFIG_FLAG and number + 1 < len(expanded):
            expanded[number + 1] = expand_path(expanded[number + 1], CONFIG_FLAG)
        elif arg.startswith(f"{CONFIG_FLAG}="):
            path = expand_path(arg.removeprefix(f"{CONFIG_FLAG}="), CONFIG_FLAG)
            expanded[number] = f"{CONFIG_FLAG}={path}"
    return expanded


def _resolve_recipe(args: Sequence[str], default_recipe: str) -> list[str]:
    """Puts the recipes' paths in the place of their names, and the default recipe where none is named."""
    resolved = list(args)
    named = False
    for i, arg in enumerate(args):
        if arg == CONFIG_FLAG and i + 1 < len(args):
            resolved[i + 1] = str(find_recipe(args[i + 1]))
            named = True
        elif arg.startswith(f"{CONFIG_FLAG}="):
            resolved[i] = f"{CONFIG_FLAG}={find_recipe(arg.removeprefix(f'{CONFIG_FLAG}='))}"
            named = True
    return resolved if named else [CONFIG_FLAG, str(find_recipe(default_recipe)), *resolved]
