"""From the text in a flag or a YAML file to the value that a setting takes, or an error."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from dehvf_ds.config.errors import UserError
from dehvf_ds.config.kinds import Kind
from dehvf_ds.config.paths import expand_path

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)


def parse_text(kind: Kind, text: str, name: str) -> Any:
    """The value that a flag's text, or a scalar of a file, stands for.

    Text settings take the text as it is. ``null`` is no value for all others that may be without one.

    Args:
        kind: what the setting takes.
        text: what was given.
        name: what messages call the setting.

    Raises:
        UserError: it is no value of this kind.
    """
    if kind.base == "text":
        return text
    if kind.optional and text == "null":
        return None
    if kind.base == "path":
        return _path(text, name)
    word = text.strip()
    if kind.base == "list":
        return _items(kind, word, name)
    if kind.base == "choice":
        if word not in kind.choices:
            raise UserError(f"{name} is {text!r}; it must be one of {', '.join(kind.choices)}")
        return word
    if kind.base == "bool":
        if word.lower() not in _BOOLS:
            raise UserError(f"{name} is {text!r}; it must be true or false")
        return _BOOLS[word.lower()]
    return _number(kind, word, name)


def flag_value(kind: Kind, text: str, name: str) -> Any:
    """The value of a flag. A list of texts takes the flag's text as its only item; others take ``[a, b]``."""
    if kind.base == "list" and not kind.is_tuple:
        return [parse_text(kind.items[0], text, name)]
    if kind.base == "list" and text.strip().startswith("["):
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            node = None
        if not isinstance(node, yaml.SequenceNode):
            raise UserError(f"{name} is {text!r}; write a list as [a, b]")
        return tuple(_take(kind, [_scalar(item, name) for item in node.value], name))
    return parse_text(kind, text, name)


def _scalar(node: yaml.Node, name: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{name}: a list in a list")
    return node.value


def _items(kind: Kind, text: str, name: str) -> Any:
    if text.startswith("["):
        raise UserError(f"{name} is {text!r}, a text; write a list without quotes")
    items = _take(kind, [part.strip() for part in text.split(",")], name)
    return tuple(items) if kind.is_tuple else items


def _take(kind: Kind, texts: list[str], name: str) -> list[Any]:
    return [
        parse_text(item, text, name)
        for item, text in zip(item_kinds(kind, len(texts), name), texts, strict=True)
    ]


def item_kinds(kind: Kind, count: int, name: str) -> list[Kind]:
    """The kinds of a list's items.

    Raises:
        UserError: it takes another number of them.
    """
    if kind.length is None:
        return [kind.items[0]] * count
    if count != kind.length:
        raise UserError(f"{name} has {count} values, not {kind.length}")
    return list(kind.items)


def _path(text: str, name: str) -> str:
    if not text.strip():
        raise UserError(f"{name} is empty; it must be a path")
    if "\0" in text:
        raise UserError(f"{name} {text!r} is no path")
    return expand_path(text, name)


def _number(kind: Kind, text: str, name: str) -> int | float:
    whole = kind.base == "int"
    if not _NOT_FINITE.fullmatch(text) and not _NUMBER.fullmatch(text):
        raise UserError(f"{name} is {text!r}, not a {'whole ' * whole}number")
    number = float(re.sub(r"\.(?=[a-z])", "", text.lower().replace("_", "")))
    if whole and math.isfinite(number) and not number.is_integer():
        raise UserError(f"{name} is {text}, not a whole number")
    assert kind.range is not None
    if number not in kind.range:
        raise UserError(f"{name} is {text}; it must be {kind.range}")
    # No range goes so far that a float would round a whole number in it.
    return int(number) if whole else number
