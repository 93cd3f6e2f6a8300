"""What becomes of rows that cannot be used: the first ends the build, or all are left out and counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import BAD_RECORD, DamagedSample, counted, one_line

Note = Callable[[str], None]
"""Takes one line that the user should read."""

MAX_NAMED = 20
"""Most rows that are named as left out."""


class BadRows:
    """Counts the rows that are left out, by reason.

    Attributes:
        skip: whether such rows are left out; otherwise the first is an error.
        counts: rows by reason.
        notes: what was put right in rows that stay, a word each.
    """

    def __init__(self, *, skip: bool, remedy: str = "repair it, or leave such rows out with --skip-bad"):
        """Begins without any; ``remedy`` ends the error's line."""
        self.skip = skip
        self._remedy = remedy
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._lines: list[str] = []
        self._names: list[str] = []

    def add(self, name: str, line: str, reason: str) -> None:
        """Leaves a row out.

        Args:
            name: the row, without this machine's paths; the manifest keeps it.
            line: what is wrong, with file and row.
            reason: a word to count it by.

        Raises:
            UserError: rows are not to be left out.
        """
        if not self.skip:
            raise UserError(f"{line}; {self._remedy}")
        self.counts[reason] += 1
        if len(self._lines) < MAX_NAMED:
            self._lines.append(line)
            self._names.append(name)

    @contextlib.contextmanager
    def row(self, name: str, where: str) -> Iterator[None]:
        """Leaves the row out whose reading fails inside, for any mistake in its annotation."""
        try:
            yield
        except DamagedSample as error:
            self.add(name, f"{where}: {error}", error.reason)
        except UserError as error:
            self.add(name, f"{where}: {error}", BAD_RECORD)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__} {one_line(error)}"
            self.add(name, f"{where}: an entry lacks a field or has another type: {reason}", BAD_RECORD)

    def tell(self, note: Note, num_rows: int) -> None:
        """Says what was left out, of how many rows, and what was put right."""
        for line in self._lines:
            note(f"left out {line}")
        total = sum(self.counts.values())
        if total > len(self._lines):
            note(f"and {total - len(self._lines)} more")
        if total:
            _, _, reasons = counted(self.counts).partition(": ")
            note(f"left out {total} of {num_rows}: {reasons}")
        for what, count in sorted(self.notes.items()):
            note(f"{count} times: {what}")

    def fields(self) -> dict[str, Any]:
        """What a manifest says of the rows that are not in the shards."""
        return {
            "left_out": sum(self.counts.values()),
            "left_out_reasons": dict(sorted(self.counts.items())),
            "left_out_first": list(self._names),
        }
