"""From flags and YAML to a checked configuration, and back."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dehvf_ds.config.settings import EvalConfig, GenerateConfig, RunConfig
from dehvf_ds.config.values import TEXT, UserError, expand_flags, settings_of

ConfigT = TypeVar("ConfigT")

_PACKAGE = Path(__file__).parents[1]

RECIPES_DIR = _PACKAGE / "recipes"

# Inside the package in a wheel, beside it in a clone.
DEEPSPEED_DIR = (_PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent) / "ds_configs"

RENAMED = {
    "model.levels": "model.feature_layers",
    "model.num_levels": "model.num_feature_layers",
    "train.levels_every": "train.router_every",
    "train.eval_every": "train.validate_every",
}
"""Names of settings before version 0.2."""

_FLAG = re.compile(r"\A--[\w.-]+(?=(?:=|\Z))")


def parse_run_config(args: Sequence[str], default_recipe: str = "demo") -> RunConfig:
    """Parses the flags of ``train.py``, which override YAML files or recipes (``--config``)."""
    return parse_config(RunConfig, args, "Trains DEHVF on DeepSpeed.", default_recipe)


def parse_eval_config(args: Sequence[str]) -> EvalConfig:
    """Parses the flags of ``eval.py``, which override YAML files."""
    return parse_config(EvalConfig, args, "Evaluates a trained DEHVF model.")


def parse_generate_config(args: Sequence[str]) -> GenerateConfig:
    """Parses the flags of ``generate.py``, which override YAML files."""
    return parse_config(GenerateConfig, args, "Describes pictures with a trained DEHVF model.")


def parse_config(
    config_class: type[ConfigT], args: Sequence[str], description: str, default_recipe: str | None = None
) -> ConfigT:
    """Parses flags, which override the files of ``--config``, into a pydantic dataclass.

    Of repeated flags the last counts. With ``default_recipe``, the default of ``--config``, that flag also
    takes names of recipes.
    """
    settings = settings_of(config_class)
    parser = _flag_parser(settings, description)
    known, unknown = parser.parse_known_args(
        [_FLAG.sub(lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
    )
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = suggestion(flag.lstrip("-"), settings) or "; quote a text that has spaces"
        raise UserError(f"{flag}: no such flag{near}")
    flags = vars(expand_flags(known, "config"))
    flags.pop("local_rank", None)
    given: dict[str, _Given] = {}
    for path in flags.pop("config", [default_recipe] if default_recipe else []):
        given |= _read_yaml(find_recipe(path) if default_recipe else Path(path), settings)
    return _build(config_class, given | {name: _Given(text, f"--{name}") for name, text in flags.items()})


def load_run_config(path: Path) -> RunConfig:
    """Reads what ``save_run_config`` wrote."""
    return _build(RunConfig, _read_yaml(path, settings_of(RunConfig)))


def save_run_config(config: RunConfig, path: Path) -> None:
    """Writes the configuration as YAML for ``--config``."""
    plain = to_jsonable_python(config, context=TEXT)
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def find_recipe(given: str) -> Path:
    """The file of ``--config``: a path, or a shipped recipe (``demo``, ``recipes/demo.yaml``).

    Shipped files are found from every working directory; an existing path comes first.
    """
    return _find("--config", given, RECIPES_DIR, ".yaml")


def find_deepspeed_json(given: str) -> Path:
    """The file of ``--deepspeed``: a path, or a shipped one (``zero3``, ``zero3.json``)."""
    return _find("--deepspeed", given, DEEPSPEED_DIR, ".json")


def looked_in(path: str | Path) -> str:
    """The directory of a relative path, to follow "no such file"; empty for an absolute path."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def suggestion(name: str, known: Collection[str]) -> str:
    """Ends a message about an unknown name: the nearest known one."""
    if name in RENAMED:
        return f"; it is {RENAMED[name]} now"
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.rpartition(".")[2] == last]
    return f"; did you mean {near[0]}?" if near else ""


# A setting, the values with which others have no effect, and those others.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("model.fusion", lambda fusion: fusion != "prefix", "model.prefix_tokens"),
    ("model.fusion", lambda fusion: fusion != "ffn", "model.router model.router_dim model.rank"),
    ("model.fusion", lambda fusion: fusion != "ffn", "model.feature_layers model.num_feature_layers"),
    ("model.fusion", lambda fusion: fusion == "none", "model.image_size"),
    ("model.router", lambda router: router != "layer", "model.router_dim"),
    ("model.feature_layers", lambda layers: layers is not None, "model.num_feature_layers"),
    ("model.lora.rank", lambda rank: rank == 0, "model.lora.alpha model.lora.dropout model.lora.targets"),
    ("data.task", lambda task: task != "caption", "data.prompt data.captions"),
    ("data.task", lambda task: task != "scienceqa", "data.scienceqa.image_captions"),
    ("data.task", lambda task: task != "scienceqa", "data.scienceqa.lecture data.scienceqa.solution"),
    ("data.cache_dir", lambda path: path is None, "data.cache_gb"),
    ("data.on_bad", lambda on_bad: on_bad == "raise", "data.max_bad_share"),
    ("data.val", lambda path: path is None, "data.val_samples train.validate_every"),
    ("eval.every_steps", lambda steps: steps == 0, "eval.data eval.max_samples eval.batch_size"),
    ("eval.every_steps", lambda steps: steps == 0, "eval.max_new_tokens eval.num_beams eval.tokenizer"),
    ("resume", lambda resume: resume not in ("auto", "never"), "init_from"),
)


def ignored_settings(config: RunConfig) -> list[str]:
    """A line for each setting that is not at its default but has no effect because of another."""
    lines: dict[str, str] = {}
    for cause, is_idle, names in WITHOUT_EFFECT:
        found = attrgetter(cause)(config)
        for name in names.split() if is_idle(found) else ():
            value = attrgetter(name)(config)
            if value != settings_of(RunConfig)[name].get_default():
                lines.setdefault(name, f"{name} {value} has no effect: {cause} is {found}")
    return list(lines.values())


class _Given(NamedTuple):
    """A value as it was written, and where."""

    text: str | list[str | None] | None
    place: str


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; a value that begins with - is written --NAME=VALUE")


def _flag_parser(settings: Mapping[str, FieldInfo], description: str) -> argparse.ArgumentParser:
    parser = _FlagParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    about = "a YAML file; for training also a recipe's name"
    parser.add_argument("--config", action="append", metavar="FILE", help=about)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    for name, field in settings.items():
        default = field.get_default(call_default_factory=True)
        about = f"{field.description} ({'needed' if field.is_required() else f'default: {default}'})"
        options: dict[str, Any] = {"dest": name, "metavar": "VALUE", "help": about.replace("%", "%%")}
        if get_origin(field.annotation) is Literal:
            options["metavar"] = "/".join(get_args(field.annotation))
        elif field.annotation is bool:
            options |= {"nargs": "?", "const": "true"}
        elif get_origin(field.annotation) is list:
            options |= {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{name}", **options)
    return parser


def _build(config_class: type[ConfigT], given: Mapping[str, _Given]) -> ConfigT:
    nested: dict[str, Any] = {}
    for name, field in settings_of(config_class).items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        if name in given:
            # A quoted null, or that of a flag, is a text only for a text setting.
            null = given[name].text == "null" and NoneType in get_args(field.annotation)
            section[last] = None if null and field.annotation != str | None else given[name].text
    try:
        return TypeAdapter(config_class).validate_python(nested, context=TEXT)
    except ValidationError as error:
        first = error.errors()[0]
    # Without the indices of lists.
    name = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "missing" and name not in given:
        raise UserError(f"{name}: no value; give --{name}, or set it in the file of --config")
    why = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    raise UserError(f"{given[name].place if name in given else name} is {first['input']!r}; {why}")


def _read_yaml(path: Path, settings: Mapping[str, FieldInfo]) -> dict[str, _Given]:
    """The values in a YAML file by dotted name, as texts: their types are the settings', not YAML's."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    found: dict[str, _Given] = {}
    lines: dict[str, int] = {}
    for name, line, node in _nodes(root, "", path, settings) if root is not None else ():
        if name in lines:
            raise UserError(f"{path}: {name} is set twice, in lines {lines[name]} and {line}; keep one")
        lines[name] = line
        if name in settings:
            place = f"{path}, line {line}: {name}"
            listed = isinstance(node, yaml.SequenceNode)
            text = [_scalar(item, place) for item in node.value] if listed else _scalar(node, place)
            found[name] = _Given(text, place)
    return found


def _nodes(
    node: yaml.Node, prefix: str, path: Path, settings: Mapping[str, FieldInfo]
) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yields sections and settings by dotted name, with the line of their key."""
    if _is_null(node):
        return  # all lines of the section are commented out
    if not isinstance(node, yaml.MappingNode):
        what = prefix.removesuffix(".") or "the file"
        raise UserError(f"{path}, line {node.start_mark.line + 1}: {what} must hold `name: value` lines")
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        yield name, line, value
        if name not in settings:
            if not any(known.startswith(f"{name}.") for known in settings):
                raise UserError(f"{path}, line {line}: no setting {name}{suggestion(name, settings)}")
            yield from _nodes(value, f"{name}.", path, settings)


def _scalar(node: yaml.Node, place: str) -> str | None:
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        raise UserError(f"{place}: not one plain value; put it in quotes if it is a text")
    if not _is_null(node):
        return node.value
    mark = node.start_mark
    if (mark.buffer or "")[mark.pointer :].lstrip(" ").startswith("#"):
        # YAML drops a text such as `#1`.
        raise UserError(f"{place} has no value, since # begins a comment; quote a text, or write null")
    return None


def _is_null(node: yaml.Node) -> bool:
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain and node.value in ("", "~", "null", "Null", "NULL")


def _find(flag: str, given: str, directory: Path, suffix: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    shipped = directory / f"{path.name.removesuffix(suffix)}{suffix}"
    if path.parent.as_posix() in (".", directory.name, f"dehvf_ds/{directory.name}") and shipped.is_file():
        return shipped
    names = ", ".join(sorted(other.stem for other in directory.glob(f"*{suffix}")))
    raise UserError(f"{flag} {given}: no such file{looked_in(given)}; shipped with the package: {names}")
