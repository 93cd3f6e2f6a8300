"""Rows that have nothing to learn, found before a run begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import UnsupervisedError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main

MAX_SHARE = 0.25
"""Share of a first step's rows without a token to learn that a dry run refuses; a few of them are told."""


def check_supervised(
    batches: Sequence[Batch],
    uncut: Callable[[], Iterable[Batch]],
    world: World,
    *,
    data: str,
    max_tokens: int,
) -> str | None:
    """Refuses data of which too little can be learnt. Every rank must call it.

    Args:
        batches: this rank's first micro-batches.
        uncut: reads the same ones without a limit of tokens; called where one has nothing to learn.
        world: this process's place.
        data: where the rows lie, for the message.
        max_tokens: the limit, for the message.

    Returns:
        What to tell of the rows without a token to learn; None where there are none, and on other ranks.

    Raises:
        UnsupervisedError: all rows of a micro-batch, or above ``MAX_SHARE`` of all, have nothing to learn.
    """
    counts = (
        sum(len(batch.labels) for batch in batches),
        sum(batch.num_unsupervised_rows() for batch in batches),
        sum(not batch.num_supervised() for batch in batches),
    )
    rows, unsupervised, empty = map(int, all_reduce_sum([float(count) for count in counts], world.device))
    if not unsupervised:
        return None
    described = gather_to_main(_describe(batches, uncut() if counts[1] else ()), world)
    line = on_main(
        world,
        lambda: (
            f"{data}: {unsupervised} of the first {rows} rows have no token to learn; {described[0]}; "
            f"raise data.max_tokens {max_tokens}"
        ),
    )
    if empty or unsupervised > MAX_SHARE * rows:
        raise UnsupervisedError(line)
    return line if world.is_main else None


def check_validation(
    batch: Batch, uncut: Callable[[], Iterable[Batch]], world: World, *, data: str, max_tokens: int
) -> None:
    """Refuses validation rows of which none of the first ones has a token to learn. Every rank must call it.

    Rows that fill up a last micro-batch have none either, so that no share of them is looked at.

    Args:
        batch: this rank's first micro-batch; the others as of ``check_supervised``.
        uncut: reads it without a limit of tokens.
        world: this process's place.
        data: where the rows lie, for the message.
        max_tokens: the limit, for the message.

    Raises:
        UnsupervisedError: no row of any rank has one.
    """
    (supervised,) = all_reduce_sum([float(batch.num_supervised())], world.device)
    if not supervised:
        check_supervised([batch], uncut, world, data=data, max_tokens=max_tokens)


def _describe(batches: Sequence[Batch], uncut: Iterable[Batch]) -> list[str]:
    """The first row that has nothing to learn, and the length of its prompt."""
    for batch, whole in zip(batches, uncut, strict=False):
        for row, labels in enumerate(batch.labels):
            if (labels[1:] != IGNORE_INDEX).any():
                continue
            own = (whole.labels[row] != IGNORE_INDEX).nonzero()
            length = int(own[0]) if len(own) else int(whole.attention_mask[row].sum())
            return [f"the prompt of row {batch.keys[row]} has {length} tokens"]
    return []
