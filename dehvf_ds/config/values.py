"""Types of settings: numbers in a range, paths as a shell expands them. And the errors for users."""

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
    """A mistake in the user's input. Programs print its one line and exit with code 2."""


class UnsupervisedError(UserError):
    """Rows without a single supervised token. Raised on every rank, as tokens are counted over all."""


class JobError(Exception):
    """Ends the job with one line and ``code``; neither a user's mistake nor a bug."""

    code = 1


def require(condition: bool, message: str) -> None:
    """Raises ``UserError(message)`` unless the condition holds."""
    if not condition:
        raise UserError(message)


_ELSEWHERE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")


def expand_path(text: str) -> str:
    """Expands a leading ``~``, ``$VAR`` and ``${VAR}``; ``$$`` is a dollar sign.

    ``pipe:`` commands and URLs stay as they are, and so does the name of an existing file (``cost$5.jpg``) if
    its variable is not set. Raises a ``ValueError`` for an empty text, an unknown user, or a variable that is
    empty or not set.
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
        raise ValueError(f"there is no such user; ./{path} is a file in this directory")
    return path


def quote_path(path: str) -> str:
    """Writes a path so that ``expand_path`` returns it."""
    if _ELSEWHERE.match(path):
        return path
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def expand_flags(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Expands, in place, every ``Path`` among the arguments of ``argparse``, and the texts in ``names``."""
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
"""For every configuration class; wrong values in Python raise pydantic's ``ValidationError``."""

TEXT = "text"
"""Pydantic's context for a user's text, in whose paths variables are expanded."""

LocalPath = Annotated[
    str,
    AfterValidator(lambda path, info: expand_path(path) if info.context == TEXT else path),
    PlainSerializer(lambda path, info: quote_path(path) if info.context == TEXT else path, return_type=str),
]
"""A path, a hub id or a URL."""


def _whole(value: object) -> object:
    """Accepts ``1e5`` as an integer."""
    if isinstance(value, str) and "e" in value.lower():
        with suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else value
    return value


# Upper limits are far above any use, and avoid overflows.
Positive = Annotated[int, Field(ge=1, le=10**9), BeforeValidator(_whole)]
AtLeastZero = Annotated[int, Field(ge=0, le=10**9), BeforeValidator(_whole)]
PositiveNumber = Annotated[float, Field(gt=0, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


Listed = BeforeValidator(lambda value: re.findall(r"[^][,\s]+", value) if isinstance(value, str) else value)
"""For a tuple that may be written as one text, ``[a, b]`` or ``a, b``."""


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
