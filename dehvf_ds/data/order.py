"""The order of the samples: a pure function of (seed, epoch), the same on any number of ranks and workers.

C canonical streams share the examples: each owns a stretch of shards, permutes it anew every epoch, and is
read in turn with the others. The result is one endless global sequence: position p belongs to stream
p mod C, and epochs follow one another in it. Each optimizer step takes the next ``global_batch_size``
positions, so every step is full on all ranks, and the number of samples consumed is all the state needed to
resume. Ours; the streams are modelled on MosaicML Streaming's canonical nodes.

If captions of a picture stay together, streams and ranks are dealt groups of k neighbouring positions in
place of single ones, and groups are what is permuted.

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
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, UInt64

Number = TypeVar("Number", int, np.ndarray)

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


class Units(NamedTuple):
    """Keeps examples together, such as captions of a picture, in groups of ``size`` positions.

    ``leaders`` takes examples and returns for each the first one of its unit, which are up to ``size``
    neighbours; see ``Examples.leaders``.
    """

    size: int
    leaders: Callable[[Int64[np.ndarray, " examples"]], Int64[np.ndarray, " examples"]]


class _Stretch(NamedTuple):
    """A stream's pieces of shards in an epoch's order; ``skipped`` places from ``hole`` on are left out.

    A place p belongs to group (p + ``pad``) // k, so that the groups of an epoch's places are those of its
    positions. Blocks of the second pass begin ``shift`` places before those of the first.
    """

    ends: Int64[np.ndarray, " pieces"]
    offsets: Int64[np.ndarray, " pieces"]
    hole: int
    skipped: int
    block: int
    shift: int
    pad: int

    def bounds(self, number: int, *, shift: int = 0) -> tuple[int, int]:
        """First place and end of a block."""
        begin = number * self.block - shift - self.pad
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
        group_size: k, the positions that one stream and one rank have in a row.
        num_streams: C, the largest power of two up to ``MAX_STREAMS``, the number of shards and that of
            groups of examples. It never depends on the world size.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window: int,
        epoch_length: int | None = None,
        bucketing: Bucketing | None = None,
        units: Units | None = None,
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
                each stream's number of rows in a step. Groups of units are sorted by their longest row.
            units: what stays together. Units that do not fill a group are put together, and cut where that
                fails: at the ends of blocks and, if its length is not a multiple of k, of an epoch.
        """
        # Empty shards repeat an end.
        self._shard_ends = np.unique(np.cumsum(shard_sizes, dtype=np.int64))
        self.num_examples = int(self._shard_ends[-1])
        self.epoch_length = self.num_examples if epoch_length is None else epoch_length
        if not 1 <= self.epoch_length <= self.num_examples:
            raise ValueError(f"an epoch of {self.epoch_length} out of {self.num_examples} examples")
        self.group_size = 1 if units is None else units.size
        shards, groups = sum(size > 0 for size in shard_sizes), max(1, self.num_examples // self.group_size)
        self.num_streams = 1 << (min(MAX_STREAMS, shards, groups).bit_length() - 1)
        self._seed = seed
        self._window = window
        self._bucketing = bucketing
        self._units = units
        # Streams are read in turn: each keeps what it reads from, also across the end of an epoch.
        cached = lru_cache(maxsize=2 * self.num_streams)
        self._stretch = cached(self._draw_stretch)
        self._first_pass = cached(self._draw_first_pass)
        self._block = cached(self._draw_block)
        self._bucket = cached(self._draw_bucket)

    def sample_at(self, position: int) -> tuple[int, int]:
        """The epoch and the example at a global position (0 is the run's first)."""
        epoch = position // self.epoch_length
        first = epoch * self.epoch_length
        stream = position // self.group_size % self.num_streams
        if self._bucketing is None:
            return epoch, self._example(epoch, stream, self._turns(first, position, stream))
        span = self._bucketing.steps * self._bucketing.global_batch_size
        window = position // span
        turn = self._turns(max(window * span, first), position, stream)
        return epoch, int(self._bucket(epoch, stream, window)[turn])

    def _turns(self, begin: int, end: int, stream: Number) -> Number:
        """How many of the positions from ``begin`` to before ``end`` are a stream's."""

        def before(position: int) -> Number:
            group, place = position // self.group_size, position % self.group_size
            whole = (group - stream + self.num_streams - 1) // self.num_streams
            return whole * self.group_size + place * (group % self.num_streams == stream)

        return before(end) - before(begin)

    def _example(self, epoch: int, stream: int, turn: int) -> int:
        """The stream's example number ``turn`` of the epoch, before bucketing."""
        stretch = self._stretch(epoch, stream)
        place = turn if turn < stretch.hole else turn + stretch.skipped
        number = (place + stretch.pad + stretch.shift) // stretch.block
        begin, _ = stretch.bounds(number, shift=stretch.shift)
        return int(self._block(epoch, stream, number)[place - begin])

    def _draw_stretch(self, epoch: int, stream: int) -> _Stretch:
        used = self._deal(self.epoch_length, epoch)
        size, first = self.group_size, epoch * self.epoch_length
        # If C groups divide the epoch, ``used`` is the same in all epochs, and so are the stretches' bounds.
        turn = epoch if self.epoch_length % (size * self.num_streams) else 0
        left_out = self._deal(self.num_examples - self.epoch_length, turn)
        ends = np.cumsum(used + left_out)
        begin, end = int(ends[stream - 1]) if stream else 0, int(ends[stream])
        inner = np.searchsorted(self._shard_ends, begin, side="right"), np.searchsorted(self._shard_ends, end)
        cuts = np.concatenate([[begin], self._shard_ends[slice(*inner)], [end]])
        pieces = self._permute(Purpose.SHARDS, epoch, stream, 0, len(cuts) - 1)
        ends = np.cumsum(np.diff(cuts)[pieces])
        # The epoch may begin within a group.
        pad = first % size if first // size % self.num_streams == stream else 0
        lead = min(-pad % size, int(used[stream]))
        word = random_words(self._seed, Purpose.LEFT_OUT, epoch, stream, 0, 1)[0]
        whole = self._window >= end - begin
        block = end - begin + pad if whole else -(-((self._window + 1) // 2) // size) * size
        return _Stretch(
            ends=ends,
            offsets=cuts[pieces + 1] - ends,
            hole=lead + int(word) % ((int(used[stream]) - lead) // size + 1) * size,
            # Of whole groups; the last few places are left out without a hole.
            skipped=int(left_out[stream]) // size * size,
            block=block,
            shift=0 if whole else block // 2 // size * size,
            pad=pad,
        )

    def _deal(self, count: int, epoch: int) -> Int64[np.ndarray, " streams"]:
        """Each stream's share of ``count``, dealt in turn, every epoch from where the last one stopped.

        So position // k mod C is the stream in every epoch, even if C groups do not divide the epoch.
        """
        return self._turns(epoch * count, (epoch + 1) * count, np.arange(self.num_streams))

    def _draw_block(self, epoch: int, stream: int, number: int) -> Int64[np.ndarray, " examples"]:
        """A block of the second pass, whose blocks begin half a block before those of the first."""
        stretch = self._stretch(epoch, stream)
        begin, end = stretch.bounds(number, shift=stretch.shift)
        # Without a shift one pass is enough: the block is the whole stretch, or a single group.
        if not stretch.shift:
            return stretch.examples(self._arrange(Purpose.SECOND_PASS, epoch, stream, number, begin, end))
        sizes = self._sizes(stretch, begin, end)
        order = self._shuffled(Purpose.SECOND_PASS, epoch, stream, number, sizes)
        places = _laid_out((begin + np.cumsum(sizes) - sizes)[order], sizes[order])
        first = (begin + stretch.pad) // stretch.block
        before = range(first, (end - 1 + stretch.pad) // stretch.block + 1)
        passed = np.concatenate([self._first_pass(epoch, stream, b) for b in before])
        return stretch.examples(passed[places - stretch.bounds(first)[0]])

    def _draw_first_pass(self, epoch: int, stream: int, number: int) -> Int64[np.ndarray, " places"]:
        begin, end = self._stretch(epoch, stream).bounds(number)
        return self._arrange(Purpose.FIRST_PASS, epoch, stream, number, begin, end)

    def _draw_bucket(self, epoch: int, stream: int, window: int) -> Int64[np.ndarray, " examples"]:
        """A stream's examples in the part of a window of steps that is in the epoch."""
        assert self._bucketing is not None
        steps, rows, size = self._bucketing.steps, self._bucketing.global_batch_size, self.group_size
        first = epoch * self.epoch_length
        begin = max(window * steps * rows, first)
        end = min((window + 1) * steps * rows, first + self.epoch_length)
        count, turn = self._turns(begin, end, stream), self._turns(first, begin, stream)
        drawn = np.array([self._example(epoch, stream, turn + i) for i in range(count)], dtype=np.int64)
        # The epoch may begin or end within a group, which then keeps its place.
        head = min(-begin % size, count) if begin // size % self.num_streams == stream else 0
        dealt, middle = drawn.copy(), slice(head, count - (count - head) % size)
        groups = drawn[middle].reshape(-1, size)
        lengths = self._bucketing.lengths(epoch, groups.ravel()).reshape(groups.shape).max(axis=1, initial=0)
        first_group = -(-begin // size)
        first_group += (stream - first_group) % self.num_streams
        positions = (first_group + np.arange(len(groups)) * self.num_streams) * size
        # All streams draw the same order of the steps, so that their short rows meet in one step.
        keys = random_words(self._seed, Purpose.STEPS, 0, 0, window, steps)[positions // rows % steps]
        sorted_groups = np.empty_like(groups)
        sorted_groups[np.argsort(keys, kind="stable")] = groups[np.argsort(lengths, kind="stable")]
        dealt[middle] = sorted_groups.ravel()
        return dealt

    def _arrange(
        self, purpose: Purpose, epoch: int, stream: int, number: int, begin: int, end: int
    ) -> Int64[np.ndarray, " places"]:
        """The places from ``begin`` to before ``end`` in a drawn order, those of a unit in one group."""
        if self._units is None:
            return begin + self._permute(purpose, epoch, stream, number, end - begin)
        stretch = self._stretch(epoch, stream)
        leaders = self._units.leaders(stretch.examples(np.arange(begin, end)))
        starts = np.flatnonzero(np.diff(leaders, prepend=-1))
        lengths = np.diff(starts, append=end - begin)
        sizes = self._sizes(stretch, begin, end)
        words = random_words(self._seed, purpose, epoch, stream, number, len(starts) + len(sizes))
        order = np.argsort(words[: len(starts)], kind="stable")
        # Smaller groups first, which only parts of most units fit into.
        groups = np.lexsort((words[len(starts) :], sizes))
        return begin + _packed(starts[order], lengths[order], sizes, groups)

    def _sizes(self, stretch: _Stretch, begin: int, end: int) -> Int64[np.ndarray, " groups"]:
        """The sizes of the groups of the places from ``begin`` to before ``end``."""
        size = self.group_size
        inner = np.arange(begin + -(begin + stretch.pad) % size, end, size)
        return np.diff(np.unique(np.concatenate([[begin], inner, [end]])))

    def _shuffled(
        self, purpose: Purpose, epoch: int, stream: int, number: int, sizes: Int64[np.ndarray, " groups"]
    ) -> Int64[np.ndarray, " groups"]:
        """A drawn order of groups, in which those at the ends that are smaller stay there."""
        order, full = np.arange(len(sizes)), np.flatnonzero(sizes == self.group_size)
        order[full] = full[self._permute(purpose, epoch, stream, number, len(full))]
        return order

    def _permute(
        self, purpose: Purpose, epoch: int, stream: int, number: int, count: int
    ) -> Int64[np.ndarray, " count"]:
        words = random_words(self._seed, purpose, epoch, stream, number, count)
        return np.argsort(words, kind="stable")


def _laid_out(
    starts: Int64[np.ndarray, " runs"], lengths: Int64[np.ndarray, " runs"]
) -> Int64[np.ndarray, " places"]:
    """The places of runs, one run after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


def _packed(
    starts: Int64[np.ndarray, " runs"],
    lengths: Int64[np.ndarray, " runs"],
    sizes: Int64[np.ndarray, " groups"],
    order: Int64[np.ndarray, " groups"],
) -> Int64[np.ndarray, " places"]:
    """The runs' places in groups of these ``sizes``, filled in this ``order``.

    A group takes the longest run that fits, again and again; where none does, a part of the shortest.
    """
    waiting: list[list[int]] = [[] for _ in range(int(max(lengths.max(), sizes.max())) + 1)]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        waiting[length].append(start)
    filled: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for group in order.tolist():
        room = int(sizes[group])
        while room:
            length = next((n for n in range(room, 0, -1) if waiting[n]), 0)
            if not length:
                longer = next(n for n in range(room, len(waiting)) if waiting[n])
                waiting[room].append(waiting[longer].pop())
                waiting[longer - room].append(waiting[room][-1] + room)
                length = room
            filled[group].append((waiting[length].pop(), length))
            room -= length
    runs = np.array([run for group in filled for run in group])
    return _laid_out(runs[:, 0], runs[:, 1])


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One rank's micro-batches, each a list of (epoch, example); ``accumulation`` make an optimizer step.

    Step s takes positions [start_sample + s G, start_sample + (s + 1) G), G = micro_batch_size x accumulation
    x world_size; rank r takes every world_size-th group of k of them, beginning with the r-th.
    ``start_sample`` is the number of samples consumed before, by any number of ranks and with any batch size;
    a resumed rank keeps its streams if that is a multiple of k times the world size.
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
        size, rows = self.order.group_size, self.micro_batch_size
        for first in range(0, len(self) * rows, rows):
            groups = ((i // size * self.world_size + self.rank, i % size) for i in range(first, first + rows))
            yield [self.order.sample_at(self.start_sample + group * size + place) for group, place in groups]
