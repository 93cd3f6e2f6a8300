"""What a setting may be: a number in its range, a path as a shell would take it. And what is raised."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic.fields import FieldInfo


class UserError(Exception):
    """A mistake in what the user gave us. Programs print its one line and exit with code 2."""


class UnsupervisedError(UserError):
    """Rows without a single token to learn; every rank finds it, since the tokens are counted over all."""


class JobError(Exception):
    """Ends the job with one line and ``code``: no mistake of the user's, nor of a program."""

    code = 1


def require(condition: bool, message: str) -> None:
    """Raises ``UserError(message)`` unless the condition holds."""
    if not condition:
        raise UserError(message)


_ELSEWHERE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")


def expand_path(text: str) -> str:
    """Expands a leading ``~``, ``$VAR`` and ``${VAR}``; ``$$`` is a dollar sign.

    A ``pipe:`` command belongs to its shell and an address to its server: both stay as they are. So does the
    name of a file that a shell's pattern found (``cost$5.jpg``), where its variable does not exist. Raises a
    ``ValueError`` where it is no path, or names no user or a variable that is empty or not set.
    """
    if not text.strip():
        raise ValueError("it should be a path")
    template = Template(text)
    known = template.is_valid() and all(os.environ.get(name) for name in template.get_identifiers())
    if _ELSEWHERE.match(text) or (not known and Path(text).exists()):
        return text
    if not known:
        raise ValueError("a variable in it is empty or not set; write $$ for a dollar sign")
    path = os.path.expanduser(template.substitute(os.environ))  # noqa: PTH111 (a Path raises for no such user)
    if path.startswith("~") and not Path(path).exists():
        raise ValueError(f"there is no such user; ./{path} is a file in this folder")
    return path


def quote_path(path: str) -> str:
    """Writes a path so that ``expand_path`` gives it back."""
    if _ELSEWHERE.match(path):
        return path
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def expand_flags(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Expands, in place, every ``Path`` among an ``argparse`` parser's values, and the texts ``names``."""
    for name, value in vars(args).items():
        items = value if isinstance(value, list) else [value]
        paths = [isinstance(item, Path) or (name in names and item is not None) for item in items]
        try:
            new = [type(i)(expand_path(str(i))) if path else i for i, path in zip(items, paths, strict=True)]
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')} {value}: {error}") from None
        setattr(args, name, new if isinstance(value, list) else new[0])
    return args


CHECKS = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Of every configuration class. Made in Python of wrong values, one raises pydantic's ``ValidationError``."""

TEXT = "text"
"""Pydantic's context while a user's text is read or written: in its paths, variables are expanded."""

LocalPath = Annotated[
    str,
    AfterValidator(lambda path, info: expand_path(path) if info.context == TEXT else path),
    PlainSerializer(lambda path, info: quote_path(path) if info.context == TEXT else path, return_type=str),
]
"""A path, a hub id or an address."""


# Far above any use, and below what overflows a counter.
def _whole(value: object) -> object:
    """Takes ``1e5`` for the whole number that it is."""
    if isinstance(value, str) and "e" in value.lower():
        with suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else value
    return value


Positive = Annotated[int, Field(ge=1, le=10**9), BeforeValidator(_whole)]
AtLeastZero = Annotated[int, Field(ge=0, le=10**9), BeforeValidator(_whole)]
PositiveNumber = Annotated[float, Field(gt=0, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


Listed = BeforeValidator(lambda value: re.findall(r"[^][,\s]+", value) if isinstance(value, str) else value)
"""Of a tuple: it may be written as one text, ``[a, b]`` or ``a, b``."""


@cache
def settings_of(config_class: type) -> Mapping[str, FieldInfo]:
    """The settings of a configuration class by dotted name, those of its sections included."""
    found: dict[str, FieldInfo] = {}
    for name, field in config_class.__pydantic_fields__.items():  # pyright: ignore[reportAttributeAccessIssue]
        if is_dataclass(field.annotation):
            found |= {f"{name}.{inner}": setting for inner, setting in settings_of(field.annotation).items()}
        else:
            found[name] = field
    return found
