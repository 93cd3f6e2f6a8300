"""Paths as a shell would take them: ``~`` and variables expanded; addresses and commands left alone."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from dehvf_ds.config.errors import UserError

_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
_ELSEWHERE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")


def expand_path(text: str, name: str) -> str:
    """Puts the home directory in the place of a leading ``~`` and values in that of ``$VAR`` and ``${VAR}``.

    ``$$`` is a dollar sign. Files that are there under a name as it stands, with a dollar sign or a ``~``,
    are meant where there is no such variable or user. A ``pipe:`` command belongs to its shell, an address to
    its server: both stay.

    Args:
        text: the path, hub id, address or command.
        name: what the message calls it.

    Raises:
        UserError: a variable is not set or is empty, or there is no such user.
    """
    if _ELSEWHERE.match(text):
        return text

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if match[0] == "$$":
            return "$"
        found = os.environ.get(variable or "")
        if not found and Path(text).exists():
            return match[0]
        if not found:
            state = "empty" if found == "" and variable else "not set"
            raise UserError(f"{name} {text}: the variable {match[0]} is {state}; $$ is a dollar sign")
        return found

    path = _VARIABLE.sub(value, text)
    if not path.startswith("~"):
        return path
    user, slash, rest = path.partition("/")
    home = os.path.expanduser(user)  # noqa: PTH111 (a Path raises where there is no such user)
    if home == user and Path(path).exists():
        return path
    if home == user:
        raise UserError(f"{name} {text}: no home directory of {user}; ./{path} is a file in this folder")
    return home + slash + rest


def quote_path(path: str) -> str:
    """Writes a path so that ``expand_path`` gives it back."""
    if _ELSEWHERE.match(path):
        return path
    quoted = path.replace("$", "$$")
    return f"./{quoted}" if quoted.startswith("~") else quoted


def expand_flags(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Expands the paths among an ``argparse`` parser's values.

    Args:
        args: changed; every ``Path`` in it, also in a list, is a path.
        names: further ones, that are kept as texts.

    Returns:
        The same.

    Raises:
        UserError: as ``expand_path``.
    """

    def expanded(value: Any, flag: str) -> Any:
        if isinstance(value, list):
            return [expanded(item, flag) for item in value]
        return Path(expand_path(str(value), flag)) if isinstance(value, Path) else value

    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in names and value is not None:
            setattr(args, name, expand_path(value, flag))
        else:
            setattr(args, name, expanded(value, flag))
    return args
