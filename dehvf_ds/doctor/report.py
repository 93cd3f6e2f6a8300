"""The lines of the report, and the checks that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        level: ``ok``; ``warn`` where some runs suffer; ``FAIL`` where a run cannot work.
        what: what was looked at.
        found: what is there.
        remedy: what to do; empty where all is well.
    """

    level: Literal["ok", "warn", "FAIL"]
    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A function that looks at one thing, and that thing's name for the case that the function fails."""

    what: str
    look: Callable[[], Line | list[Line]]


def run_check(check: Check) -> list[Line]:
    """The lines of one check; an exception becomes a FAIL line, so that the others are still reported."""
    try:
        lines = check.look()
    # SystemExit too: a package that is broken enough may exit at its import.
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        # UserError is our own one-line message and needs no name before it.
        found = text if type(error).__name__ == "UserError" else f"{type(error).__name__}: {text}"
        remedy = "mend what is found here, then run the doctor again"
        if isinstance(error, ImportError):
            remedy = "install the packages that are FAIL above"
        return [Line("FAIL", check.what, found, remedy)]
    return lines if isinstance(lines, list) else [lines]


def format_line(line: Line) -> str:
    """``level  what  found  remedy``, in columns."""
    return f"{line.level:<4}  {line.what:<18}  {line.found:<44}  {line.remedy}".rstrip()


def format_bytes(num_bytes: int) -> str:
    """A size in GiB, or in MiB below one of them."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
