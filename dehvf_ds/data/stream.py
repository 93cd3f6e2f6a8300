"""The order of the samples: a pure function of (seed, epoch), the same on any number of ranks and workers.

A fixed number of canonical streams share the rows: each owns a stretch of shards, permutes it anew
every epoch, and is read in turn with the others. That gives one global sequence of positions without an end:
position p belongs to stream p mod C, and the epochs follow one another in it. Each optimizer step takes the
next ``global_batch_size`` positions, so all ranks take equally many steps, every step is full, and the state
to resume from is one number: the samples consumed. Ours; the streams are after MosaicML Streaming's
canonical nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

MAX_STREAMS = 64
"""Canonical streams. A part of the order: a change of this number changes every run's samples."""

_PURPOSE_SHARDS, _PURPOSE_WINDOW, _PURPOSE_CAPTION = range(3)


class Examples:
    """What one epoch goes through: every caption of every row, or every row once.

    An example's number counts rows in stored order, the captions of a row next to one another.
    """

    def __init__(
        self,
        captions: Int64[np.ndarray, " rows"],
        shard_rows: Sequence[int],
        *,
        mode: Literal["all", "one"],
        seed: int,
    ):
        """Counts the examples.

        Args:
            captions: captions of each row; 0 counts as one example without a caption.
            shard_rows: rows of each shard; they sum to ``len(captions)``.
            mode: ``all`` makes k examples of a row of k captions, ``one`` a single one.
            seed: seed of the caption choice of ``one``.
        """
        self._captions = captions
        self._mode = mode
        self._seed = seed
        row_ends = np.cumsum(shard_rows, dtype=np.int64)
        if mode == "all":
            self._ends = np.cumsum(np.maximum(captions, 1), dtype=np.int64)
            ends = self._ends[row_ends - 1]
        else:
            ends = row_ends
        self.shard_sizes: tuple[int, ...] = tuple(np.diff(ends, prepend=0).tolist())
        """Examples of each shard, as ``SampleOrder`` takes them."""

    def __len__(self) -> int:
        """Examples of one epoch."""
        return sum(self.shard_sizes)

    def resolve(self, epoch: int, example: int) -> tuple[int, int | None]:
        """The row of an example and which of its captions to take; None where the row has none."""
        if self._mode == "all":
            row = int(np.searchsorted(self._ends, example, side="right"))
            count = int(self._captions[row])
            return row, example - int(self._ends[row]) + count if count else None
        count = int(self._captions[example])
        if count == 0:
            return example, None
        # The remainder's bias, count / 2**64, is nothing.
        return example, int(_draw(self._seed, epoch, example, _PURPOSE_CAPTION, 1)[0] % np.uint64(count))


class SampleOrder:
    """The endless global sequence of (epoch, example).

    Costs: a stream's order is drawn when its first position is asked for, 8 bytes and about 0.2 us an
    example, and kept for about two epochs. A rank whose world size divides the number of streams
    asks for its own streams only.

    Attributes:
        num_examples: examples of one epoch; each stands exactly once in it.
        num_streams: C, the largest power of two that neither ``MAX_STREAMS`` nor the number of shards
            nor that of examples is below. It never depends on the world size.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window: int):
        """Prepares the order.

        Args:
            shard_sizes: examples of each shard, in stored order.
            seed: seed of the run.
            window: examples among which a stream's order is drawn: shards are permuted, then every example
                moves by less than this. A window as long as the stream shuffles it whole.
        """
        self._shard_ends = np.cumsum(shard_sizes, dtype=np.int64)
        self.num_examples = int(self._shard_ends[-1])
        shards = sum(size > 0 for size in shard_sizes)
        self.num_streams = 1 << (min(MAX_STREAMS, shards, self.num_examples).bit_length() - 1)
        self._seed = seed
        self._window = window
        self._drawn: dict[tuple[int, int], Int64[np.ndarray, " examples"]] = {}

    def sample_at(self, position: int) -> tuple[int, int]:
        """The epoch and the example at a global position (0 is the run's first)."""
        epoch, index = divmod(position, self.num_examples)
        order = self._stream_order(epoch, position % self.num_streams)
        return epoch, int(order[index // self.num_streams])

    def _stream_order(self, epoch: int, stream: int) -> Int64[np.ndarray, " examples"]:
        if (epoch, stream) not in self._drawn:
            if len(self._drawn) >= 2 * self.num_streams:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[epoch, stream] = self._draw_stream(epoch, stream)
        return self._drawn[epoch, stream]

    def _draw_stream(self, epoch: int, stream: int) -> Int64[np.ndarray, " examples"]:
        # A stream's first index in the epoch; where C does not divide N it moves by one from epoch to
        # epoch, and the stretches' bounds with it, so that position mod C names the stream for ever.
        firsts = (np.arange(self.num_streams) - epoch * self.num_examples) % self.num_streams
        ends = np.cumsum((self.num_examples - firsts + self.num_streams - 1) // self.num_streams)
        begin, end = int(ends[stream - 1]) if stream else 0, int(ends[stream])

        inner = self._shard_ends[(self._shard_ends > begin) & (self._shard_ends < end)]
        cuts = np.unique(np.concatenate([[begin], inner, [end]]))
        pieces = [np.arange(a, b, dtype=np.int64) for a, b in pairwise(cuts)]
        keys = _draw(self._seed, epoch, stream, _PURPOSE_SHARDS, len(pieces))
        order = np.concatenate([pieces[i] for i in np.argsort(keys, kind="stable")])

        keys = _draw(self._seed, epoch, stream, _PURPOSE_WINDOW, len(order))
        if self._window < len(order):
            unit = (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
            keys = np.arange(len(order)) + unit * self._window
        return order[np.argsort(keys, kind="stable")]


def micro_batches(
    order: SampleOrder,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    accumulation: int,
    start_step: int,
    num_steps: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yields one rank's micro-batches, ``accumulation`` to an optimizer step.

    Step s takes positions [s G, (s + 1) G), G = micro_batch_size x accumulation x world_size; rank r takes
    those that leave r when divided by the world size, in rising order.

    Args:
        order: the global sequence.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: rows of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        start_step: first step; it resumes after ``start_step * G`` samples consumed.
        num_steps: steps to yield.
    """
    for first in range(start_step * accumulation, (start_step + num_steps) * accumulation):
        row = first * micro_batch_size
        yield [order.sample_at((row + i) * world_size + rank) for i in range(micro_batch_size)]


def _draw(seed: int, epoch: int, number: int, purpose: int, count: int) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit words; raw, for numpy promises those across versions, not ``Generator``'s methods."""
    entropy = np.random.SeedSequence([seed & (2**64 - 1), epoch, number, purpose])
    return np.random.PCG64(entropy).random_raw(count)
