"""The order of the samples: a pure function of (seed, epoch), the same on any number of ranks and workers.

C canonical streams share the examples: each owns a stretch of shards, permutes it anew every epoch, and is
read in turn with the others. The result is one endless global sequence: position p belongs to stream
p mod C, and epochs follow one another in it. Each optimizer step takes the next ``global_batch_size``
positions, so every step is full on all ranks, and the number of samples consumed is all the state needed to
resume. Ours; the streams are modelled on MosaicML Streaming's canonical nodes.

If the world size divides C, a rank reads the shards of its own C / world size streams, nearly the same ones
in every epoch: about C / world size x (1 + window / examples of a shard) shards are in use at a time. The
window holds numbers, not samples; a longer one spreads the captions of a picture further apart, and the reads
over more shards. Bucketing gives the rows of a step similar lengths, and whatever else depends on length,
such as the source of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

MAX_STREAMS = 64
"""Canonical streams. Changing this number changes every run's order."""


class Purpose(IntEnum):
    """What random words are for. Changing a number changes what every run draws."""

    SHARDS = 0
    FIRST_PASS = 1
    SECOND_PASS = 2
    LEFT_OUT = 3
    STEPS = 4
    CAPTION = 5
    VIEW = 6


def random_words(
    seed: int, purpose: Purpose, epoch: int, group: int, number: int, count: int
) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit words as a pure function of what they are drawn for.

    Raw words are the same in all versions of numpy, unlike ``Generator``'s methods. ``group`` is a stream or
    shard, ``number`` a block, a window or an example. The seed is taken modulo 2**64.
    """
    entropy = np.random.SeedSequence([seed & (2**64 - 1), int(purpose), epoch, group, number])
    return np.random.PCG64(entropy).random_raw(count)


class Bucketing(NamedTuple):
    """Sorts rows of similar length into the same optimizer step, within windows of ``steps`` steps.

    The order then depends on ``global_batch_size``. ``lengths`` takes an epoch and its examples, and returns
    their lengths in any unit, as ``Examples.lengths`` does.
    """

    steps: int
    global_batch_size: int
    lengths: Callable[[int, Int64[np.ndarray, " examples"]], Int64[np.ndarray, " examples"]]


class _Stretch(NamedTuple):
    """A stream's pieces of shards in an epoch's order; ``left_out`` places from ``hole`` on are skipped."""

    ends: Int64[np.ndarray, " pieces"]
    offsets: Int64[np.ndarray, " pieces"]
    hole: int
    left_out: int
    block: int
    shift: int

    def bounds(self, number: int) -> tuple[int, int]:
        """First place and end of a block of the second pass."""
        begin = number * self.block - self.shift
        return max(begin, 0), min(begin + self.block, int(self.ends[-1]))

    def examples(self, places: Int64[np.ndarray, " places"]) -> Int64[np.ndarray, " places"]:
        """The examples at these places."""
        return places + self.offsets[np.searchsorted(self.ends, places, side="right")]


class SampleOrder:
    """The endless global sequence of (epoch, example).

    A position is found without its predecessors: the shards of its stream and one or two blocks of half a
    window are drawn, about 0.1 us per example of the window, and kept for the positions that follow.

    Attributes:
        num_examples: examples to choose from.
        epoch_length: positions of an epoch; no example occurs twice in it.
        num_streams: C, the largest power of two up to ``MAX_STREAMS``, the number of shards and that of
            examples. It never depends on the world size.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window: int,
        epoch_length: int | None = None,
        bucketing: Bucketing | None = None,
    ):
        """Prepares the order.

        Args:
            shard_sizes: examples of each shard, in stored order.
            seed: of the run.
            window: examples among which a stream's order is drawn: shards are permuted, then every example
                moves by less than this. A window as long as the stream shuffles it completely.
            epoch_length: examples of an epoch, all of them if None. If fewer, each epoch leaves out others,
                one run of neighbours in each stream's order.
            bucketing: reorders inside each stream; the rows of a window of steps stay the same, and so does
                each stream's number of rows in a step.
        """
        # Empty shards repeat an end.
        self._shard_ends = np.unique(np.cumsum(shard_sizes, dtype=np.int64))
        self.num_examples = int(self._shard_ends[-1])
        self.epoch_length = self.num_examples if epoch_length is None else epoch_length
        if not 1 <= self.epoch_length <= self.num_examples:
            raise ValueError(f"an epoch of {self.epoch_length} out of {self.num_examples} examples")
        shards = sum(size > 0 for size in shard_sizes)
        self.num_streams = 1 << (min(MAX_STREAMS, shards, self.num_examples).bit_length() - 1)
        self._seed = seed
        self._window = window
        self._bucketing = bucketing
        # Streams are read in turn: each keeps what it reads from, also across the end of an epoch.
        cached = lru_cache(maxsize=2 * self.num_streams)
        self._stretch = cached(self._draw_stretch)
        self._first_pass = cached(self._draw_first_pass)
        self._block = cached(self._draw_block)
        self._bucket = cached(self._draw_bucket)

    def sample_at(self, position: int) -> tuple[int, int]:
        """The epoch and the example at a global position (0 is the run's first)."""
        epoch, index = divmod(position, self.epoch_length)
        stream = position % self.num_streams
        if self._bucketing is None:
            return epoch, self._example(epoch, stream, index // self.num_streams)
        span = self._bucketing.steps * self._bucketing.global_batch_size
        window = position // span
        # The stream's first position in the window is less than C after the window begins in the epoch.
        turn = min(position - window * span, index) // self.num_streams
        return epoch, int(self._bucket(epoch, stream, window)[turn])

    def _example(self, epoch: int, stream: int, turn: int) -> int:
        """The stream's example number ``turn`` of the epoch, before bucketing."""
        stretch = self._stretch(epoch, stream)
        place = turn if turn < stretch.hole else turn + stretch.left_out
        number = (place + stretch.shift) // stretch.block
        return int(self._block(epoch, stream, number)[place - stretch.bounds(number)[0]])

    def _draw_stretch(self, epoch: int, stream: int) -> _Stretch:
        used = self._deal(self.epoch_length, epoch)
        # If C divides the epoch, ``used`` is the same in all epochs, and so are the stretches' bounds.
        turn = epoch if self.epoch_length % self.num_streams else 0
        left_out = self._deal(self.num_examples - self.epoch_length, turn)
        ends = np.cumsum(used + left_out)
        begin, end = int(ends[stream - 1]) if stream else 0, int(ends[stream])
        inner = np.searchsorted(self._shard_ends, begin, side="right"), np.searchsorted(self._shard_ends, end)
        cuts = np.concatenate([[begin], self._shard_ends[slice(*inner)], [end]])
        pieces = self._permute(Purpose.SHARDS, epoch, stream, 0, len(cuts) - 1)
        ends = np.cumsum(np.diff(cuts)[pieces])
        word = random_words(self._seed, Purpose.LEFT_OUT, epoch, stream, 0, 1)[0]
        whole = self._window >= end - begin
        block = end - begin if whole else (self._window + 1) // 2
        return _Stretch(
            ends=ends,
            offsets=cuts[pieces + 1] - ends,
            hole=int(word) % (int(used[stream]) + 1),
            left_out=int(left_out[stream]),
            block=block,
            shift=0 if whole else block // 2,
        )

    def _deal(self, count: int, epoch: int) -> Int64[np.ndarray, " streams"]:
        """Each stream's share of ``count``, dealt in turn, every epoch from where the last one stopped.

        So position mod C is the stream in every epoch, even if C does not divide the epoch.
        """
        first = (np.arange(self.num_streams) - epoch * count) % self.num_streams
        return (count - first + self.num_streams - 1) // self.num_streams

    def _draw_block(self, epoch: int, stream: int, number: int) -> Int64[np.ndarray, " examples"]:
        """A block of the second pass, whose blocks begin half a block before those of the first."""
        stretch = self._stretch(epoch, stream)
        begin, end = stretch.bounds(number)
        places = begin + self._permute(Purpose.SECOND_PASS, epoch, stream, number, end - begin)
        # Without a shift one pass is enough: the block is the whole stretch, or a single example.
        if stretch.shift:
            first = begin // stretch.block
            before = range(first, (end - 1) // stretch.block + 1)
            passed = np.concatenate([self._first_pass(epoch, stream, b) for b in before])
            places = passed[places - first * stretch.block]
        return stretch.examples(places)

    def _draw_first_pass(self, epoch: int, stream: int, number: int) -> Int64[np.ndarray, " places"]:
        stretch = self._stretch(epoch, stream)
        begin = number * stretch.block
        end = min(begin + stretch.block, int(stretch.ends[-1]))
        return begin + self._permute(Purpose.FIRST_PASS, epoch, stream, number, end - begin)

    def _draw_bucket(self, epoch: int, stream: int, window: int) -> Int64[np.ndarray, " examples"]:
        """A stream's examples in the part of a window of steps that is in the epoch."""
        assert self._bucketing is not None
        steps, rows = self._bucketing.steps, self._bucketing.global_batch_size
        first = epoch * self.epoch_length
        begin = max(window * steps * rows, first)
        end = min((window + 1) * steps * rows, first + self.epoch_length)
        positions = np.arange(begin + (stream - begin) % self.num_streams, end, self.num_streams)
        turns = ((positions - first) // self.num_streams).tolist()
        drawn = np.array([self._example(epoch, stream, turn) for turn in turns], dtype=np.int64)
        # All streams draw the same order of the steps, so that their short rows meet in one step.
        keys = random_words(self._seed, Purpose.STEPS, 0, 0, window, steps)[positions // rows % steps]
        dealt = np.empty_like(drawn)
        by_length = np.argsort(self._bucketing.lengths(epoch, drawn), kind="stable")
        dealt[np.argsort(keys, kind="stable")] = drawn[by_length]
        return dealt

    def _permute(
        self, purpose: Purpose, epoch: int, stream: int, number: int, count: int
    ) -> Int64[np.ndarray, " count"]:
        words = random_words(self._seed, purpose, epoch, stream, number, count)
        return np.argsort(words, kind="stable")


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One rank's micro-batches, each a list of (epoch, example); ``accumulation`` make an optimizer step.

    Step s takes positions [start_sample + s G, start_sample + (s + 1) G), G = micro_batch_size x accumulation
    x world_size; rank r takes every world_size-th of them, beginning with the r-th. ``start_sample`` is the
    number of samples consumed before, by any number of ranks and with any batch size; a resumed rank keeps
    its streams if that is a multiple of the world size.
    """

    order: SampleOrder
    rank: int
    world_size: int
    micro_batch_size: int
    accumulation: int
    start_sample: int
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = range(self.micro_batch_size)
        for first in range(0, len(self) * self.micro_batch_size, self.micro_batch_size):
            begin = self.start_sample + first * self.world_size + self.rank
            yield [self.order.sample_at(begin + i * self.world_size) for i in rows]
