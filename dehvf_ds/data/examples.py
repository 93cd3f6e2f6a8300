"""The examples of an epoch, every caption of every row or every row once; and how a row is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from math import gcd
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer
from PIL import Image

from dehvf_ds.batch import Sample
from dehvf_ds.config import DataConfig
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.order import MAX_STREAMS, Purpose, random_words
from dehvf_ds.data.prompts import Task
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import UNDECODABLE, DamagedSample, picture_name


class _Shard(NamedTuple):
    """Captions of a shard's rows, ``counts`` of its texts (at least 1), and where each row's texts end."""

    captions: Integer[np.ndarray, " rows"]
    counts: Int64[np.ndarray, " rows"]
    ends: Int64[np.ndarray, " rows"]


class Examples:
    """The examples of a data set by number.

    In mode ``all`` a row of k captions is k examples (one if it has none), numbered in stored order; in mode
    ``one`` a row is one example, and one of its captions is drawn for each epoch. Caption counts and lengths
    are read shard by shard as needed, so that memory maps of any length stay on disk.

    Attributes:
        index: the opened shards.
        shard_sizes: examples of each shard.
    """

    def __init__(self, index: ShardIndex, *, mode: Literal["all", "one"], seed: int):
        """Reads no rows yet; ``seed`` draws the captions of ``one``."""
        self.index = index
        self.shard_sizes = index.shard_examples if mode == "all" else index.shard_rows
        self._mode = mode
        self._seed = seed
        self._captions = index.captions
        self._first_rows, self._first_texts = _firsts(index.shard_rows), _firsts(index.shard_examples)
        self._firsts = self._first_texts if mode == "all" else self._first_rows
        # More shards than the streams of one rank are reading from at a time.
        cached = lru_cache(maxsize=2 * MAX_STREAMS)
        self._shard = cached(self._count_shard)
        self._chosen = cached(self._choose_texts)

    def __len__(self) -> int:
        """Examples of an epoch."""
        return int(self._firsts[-1])

    def resolve(self, epoch: int, example: int) -> tuple[int, int | None]:
        """The row of an example and the number of its caption; None if the row has no captions."""
        shard, place = self._locate(example)
        captions, counts, ends = self._shard(shard)
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
            lengths[mine] = np.asarray(self.index.text_lengths[first:end])[texts]
        return lengths

    def leaders(self, examples: Int64[np.ndarray, " examples"], size: int) -> Int64[np.ndarray, " examples"]:
        """For each example the first of its unit: ``size`` captions of its row, or what is left of them."""
        if size == 1:
            return examples
        leaders = examples.copy()
        shards = np.searchsorted(self._firsts, examples, side="right") - 1
        for shard in np.unique(shards).tolist() if self._mode == "all" else ():
            mine = shards == shard
            texts = examples[mine] - self._firsts[shard]
            _, counts, ends = self._shard(shard)
            rows = np.searchsorted(ends, texts, side="right")
            leaders[mine] -= (texts - ends[rows] + counts[rows]) % size
        return leaders

    def substitutes(self, example: int) -> Iterator[int]:
        """Yields what may replace a damaged example: all others of its shard, always in the same order.

        Each caption of a row starts at a different other row; the row's own other captions come last.
        """
        shard, place = self._locate(example)
        size, begin, end = self.shard_sizes[shard], place, place + 1
        if self._mode == "all":
            _, counts, ends = self._shard(shard)
            row = int(np.searchsorted(ends, place, side="right"))
            begin, end = int(ends[row] - counts[row]), int(ends[row])
        first, own = int(self._firsts[shard]), end - begin
        if others := size - own:
            stride = next(stride for stride in count(own) if gcd(stride, others) == 1)
            for k in range(others):
                yield first + (end + (place - begin + k * stride) % others) % size
        for k in range(1, own):
            yield first + begin + (place - begin + k) % own

    def _locate(self, example: int) -> tuple[int, int]:
        """An example's shard and its place there."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, example, side="right")) - 1
        return shard, example - int(self._firsts[shard])

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
        _, counts, ends = self._shard(shard)
        words = random_words(self._seed, Purpose.CAPTION, epoch, shard, 0, len(counts))
        # The bias of the remainder, count / 2**64, is negligible.
        return ends - counts + (words % counts.astype(np.uint64)).astype(np.int64)


def open_examples(config: DataConfig, *, seed: int) -> Examples:
    """Opens the training shards; they must hold rows of the task only."""
    index = ShardIndex.of_training(config)
    index.check_task(config.task)
    return Examples(index, mode=config.captions, seed=seed)


def read_sample(
    index: ShardIndex,
    row: int,
    *,
    epoch: int = 0,
    example: int = 0,
    caption: int | None = None,
    shorter_side: int | None = None,
    task: Task | None = None,
    decoded: dict[bytes, Image.Image] | None = None,
) -> Sample:
    """Reads and decodes one row; ``epoch`` and ``example`` as in ``Sample``, the side as in ``decode_image``.

    ``caption`` is the number of the caption to learn, which becomes the record's field ``caption``. Pictures
    in ``decoded``, by their bytes, are taken from there, and others put there: samples of equal bytes then
    share one picture.

    Raises:
        DamagedSample: the row is damaged, lacks its picture, or is not for ``task`` (None accepts any).
    """
    members = index.read(row)
    where = f"{members['__url__']} ({members['__key__']})"
    try:
        checked = read_record({**members, "__url__": where})
    except DamagedSample as error:
        remedy = (
            f"leave such samples out: tools/build_shards.py index {index.directory} --overwrite --skip-bad"
        )
        raise DamagedSample(f"{error}; build the shards again, or {remedy}", error.reason) from None
    if task is not None and checked.task != task:
        raise DamagedSample(f"{where}: a row for data.task {checked.task}, not {task}")
    record, name = checked.record, picture_name(members)
    known = {} if decoded is None else decoded
    try:
        if name is not None and members[name] not in known:
            known[members[name]] = decode_image(members[name], shorter_side=shorter_side)
    except ValueError as error:
        message = f"{where}: {error}; repair the picture and build the shards again"
        raise DamagedSample(message, UNDECODABLE) from error
    if caption is not None:
        if caption >= len(record.get("captions", ())):
            raise DamagedSample(f"{where}: has fewer captions than its index says; make the index again")
        record["caption"] = record["captions"][caption]
    return Sample(
        key=members["__key__"],
        image=None if name is None else known[members[name]],
        record=record,
        messages=checked.messages,
        epoch=epoch,
        example=example,
    )


def _firsts(sizes: Sequence[int]) -> Int64[np.ndarray, " shards+1"]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
