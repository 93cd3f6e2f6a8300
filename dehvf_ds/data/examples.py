"""What one epoch goes through: every caption of every row, or every row once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import gcd
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from dehvf_ds.data.draw import Purpose, random_words
from dehvf_ds.data.stream import Recent

# Shards whose counts are kept: more than the streams of one rank are reading from at a time.
_KEPT_SHARDS = 2 * 64


class _Shard(NamedTuple):
    """Captions of a shard's rows, at least 1 in ``counts``, and where each row's texts end in the shard."""

    captions: Integer[np.ndarray, " rows"]
    counts: Int64[np.ndarray, " rows"]
    ends: Int64[np.ndarray, " rows"]


class Examples:
    """The examples of a data set by number.

    In mode ``all`` the number counts rows in stored order, the captions of a row next to one another; in
    mode ``one`` it is the row's. Both arrays are sliced shard by shard, as shards are touched, so that
    memory maps of any length stay on disk.
    """

    def __init__(
        self,
        captions: Integer[np.ndarray, " rows"],
        shard_rows: Sequence[int],
        shard_examples: Sequence[int],
        text_lengths: Integer[np.ndarray, " texts"],
        *,
        mode: Literal["all", "one"],
        seed: int,
    ):
        """Keeps where the shards begin.

        Args:
            captions: captions of each row; 0 counts as one example without a caption.
            shard_rows: rows of each shard.
            shard_examples: examples of each shard in mode ``all``: the sum of max(captions, 1) over its rows.
            text_lengths: characters of each example's text in the numbering of mode ``all``.
            mode: ``all`` makes k examples of a row of k captions, ``one`` a single one.
            seed: seed of the caption choice of ``one``.
        """
        self._captions = captions
        self._text_lengths = text_lengths
        self._mode = mode
        self._seed = seed
        self.shard_sizes: tuple[int, ...] = tuple(shard_examples if mode == "all" else shard_rows)
        """Examples of each shard, as ``SampleOrder`` takes them."""
        self._first_rows = _firsts(shard_rows)
        self._first_texts = _firsts(shard_examples)
        self._firsts = self._first_texts if mode == "all" else self._first_rows
        self._shards = Recent(self._count_shard, _KEPT_SHARDS)
        self._chosen = Recent(self._choose_texts, _KEPT_SHARDS)

    def __len__(self) -> int:
        """Examples to go through in an epoch."""
        return int(self._firsts[-1])

    def resolve(self, epoch: int, example: int) -> tuple[int, int | None]:
        """The row of an example and which of its captions to take; None where the row has none.

        Raises:
            IndexError: there is no such example.
        """
        shard, place = self._locate(example)
        captions, counts, ends = self._shards(shard)
        text = place if self._mode == "all" else int(self._chosen(epoch, shard)[place])
        row = int(np.searchsorted(ends, text, side="right"))
        caption = text - int(ends[row] - counts[row]) if captions[row] else None
        return int(self._first_rows[shard]) + row, caption

    def lengths(self, epoch: int, examples: Int64[np.ndarray, " examples"]) -> Int64[np.ndarray, " examples"]:
        """Characters of the examples' texts; in mode ``one`` of the captions drawn for this epoch."""
        lengths = np.empty(len(examples), dtype=np.int64)
        shards = np.searchsorted(self._firsts, examples, side="right") - 1
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            texts = examples[mine] - self._firsts[shard]
            if self._mode == "one":
                texts = self._chosen(epoch, shard)[texts]
            first, end = self._first_texts[shard : shard + 2].tolist()
            lengths[mine] = np.asarray(self._text_lengths[first:end])[texts]
        return lengths

    def alternative(self, example: int, attempt: int) -> int:
        """The example that stands in for a damaged one: another of its shard for each attempt.

        Attempts leave the row at once, with a different target for each of its captions, and come back to
        its other captions last.

        Args:
            example: the damaged example.
            attempt: 0 is the example itself; the further ones are each of the shard's others once.

        Raises:
            IndexError: there is no such example, or the shard has no further one.
        """
        shard, place = self._locate(example)
        size = self.shard_sizes[shard]
        if not 0 <= attempt < size:
            raise IndexError(f"attempt {attempt}: shard {shard} holds {size} examples")
        if attempt == 0:
            return example
        end, own = self._row_around(shard, place)
        others = size - own
        if attempt <= others:
            stride = next(stride for stride in count(own) if gcd(stride, others) == 1)
            moved = end + (place - (end - own) + (attempt - 1) * stride) % others
        else:
            moved = end - own + (place - (end - own) + attempt - others) % own
        return int(self._firsts[shard]) + moved % size

    def _locate(self, example: int) -> tuple[int, int]:
        """An example's shard and its place there."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, example, side="right")) - 1
        return shard, example - int(self._firsts[shard])

    def _row_around(self, shard: int, place: int) -> tuple[int, int]:
        """Where the examples of the row at ``place`` end in the shard, and how many they are."""
        if self._mode == "one":
            return place + 1, 1
        _, counts, ends = self._shards(shard)
        row = int(np.searchsorted(ends, place, side="right"))
        return int(ends[row]), int(counts[row])

    def _count_shard(self, shard: int) -> _Shard:
        first, end = self._first_rows[shard : shard + 2].tolist()
        captions = np.asarray(self._captions[first:end])
        counts = np.maximum(captions, 1).astype(np.int64)
        ends = np.cumsum(counts)
        texts = int(self._first_texts[shard + 1] - self._first_texts[shard])
        assert ends[-1] == texts, f"shard {shard}: {ends[-1]} texts, not {texts} as promised"
        return _Shard(captions, counts, ends)

    def _choose_texts(self, epoch: int, shard: int) -> Int64[np.ndarray, " rows"]:
        """The text of each row of a shard for an epoch."""
        _, counts, ends = self._shards(shard)
        words = random_words(self._seed, Purpose.CAPTION, epoch, shard, 0, len(counts))
        # The remainder's bias, count / 2**64, is nothing.
        return ends - counts + (words % counts.astype(np.uint64)).astype(np.int64)


def _firsts(sizes: Sequence[int]) -> Int64[np.ndarray, " shards+1"]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
