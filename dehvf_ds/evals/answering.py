"""Every row answered once: shared out over the ranks, saved as it goes, gathered at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dehvf_ds.config import UserError
from dehvf_ds.distributed import World, gather_to_main, on_main
from dehvf_ds.evals.parts import AnswerParts

LINES = 20
"""Plain lines of progress where the console is no terminal."""


def answer_rows(
    lengths: Sequence[int],
    ask: Callable[[Sequence[int]], Sequence[Any]],
    parts: AnswerParts,
    world: World,
    batch_size: int,
) -> list[Any]:
    """Answers the rows that no earlier part of this evaluation has answered. Every rank must call it.

    The longest prompts come first, so that rows of a batch are of similar length and a batch that does not
    fit fails at the start.

    Args:
        lengths: of each row's prompt, in any unit.
        ask: answers some rows; the answers must be JSON values.
        parts: the answers so far.
        world: this process's place.
        batch_size: rows asked together.

    Returns:
        The answers in the rows' order on rank 0; nothing on the others.

    Raises:
        UserError: a row cannot be read, or the answers cannot be saved.
    """
    # Rank 0 alone, before anybody writes.
    done: dict[int, Any] = on_main(world, parts.read)
    left = sorted((row for row in range(len(lengths)) if row not in done), key=lambda row: -lengths[row])
    own = left[world.rank :: world.size]
    if done and world.is_main:
        print(f"going on after {len(done)} of {len(lengths)} rows", flush=True)
    answered: list[tuple[int, Any]] = []
    with _Bar(len(own), world) as bar:
        for start in range(0, len(own), batch_size):
            rows = own[start : start + batch_size]
            answers = ask(rows)
            parts.add(rows, answers)
            answered += zip(rows, answers, strict=True)
            bar.advance(len(rows))
    gathered = gather_to_main(answered, world)
    if not world.is_main:
        return []
    rows = [*done, *(row for row, _ in gathered)]
    if sorted(rows) != list(range(len(lengths))):
        raise UserError(
            f"{parts.directory}: {len(rows)} answers to {len(set(rows))} of {len(lengths)} rows; remove it"
        )
    return [answer for _, answer in sorted([*done.items(), *gathered], key=lambda pair: pair[0])]


class _Bar:
    """A progress bar on rank 0, or plain lines."""

    def __init__(self, total: int, world: World):
        console = Console(file=sys.stdout)
        self._bar = Progress(console=console) if world.is_main and console.is_terminal else None
        self._told = world.is_main and self._bar is None
        self._total, self._done = total, 0

    def __enter__(self) -> _Bar:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("answered", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        before, self._done = self._done, self._done + count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._told and before * LINES // self._total < self._done * LINES // self._total:
            print(f"answered {self._done} of this rank's {self._total} rows", flush=True)
