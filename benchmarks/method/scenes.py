"""The task: captions of drawn scenes, each word of which hangs on something else in the picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import BASES, DTYPE
from PIL import Image
from torch import Tensor
from tower import IMAGE_SIZE, PlayedTower, cached_states

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.data.collate import Collator, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.demo import outcome
from dehvf_ds.demo.scenes import BACKGROUNDS, RADII

DATA = Path("demo_data/scenes/shards")
CACHE = Path("demo_data/method")
CAPTIONS_A_PICTURE = 5
WORDS = outcome.WORDS | {"size": set(RADII) - {"middle"}, "background": set(BACKGROUNDS)}
"""Words by what they hang on, from shallow to deep; those of relations and counts are looked at apart."""
RELATIONS = ("left of", "right of", "above", "below", "in a row", "in a column")
GRANULARITIES = (*WORDS, "count", "relation")


class Split:
    """Rows of a split, with what the tower saw of their pictures."""

    def __init__(self, name: str) -> None:
        self.index = ShardIndex(DATA / name)
        self.states = cached_states(self.index, CACHE / f"scenes-{name}")
        self.tokenizer = load_tokenizer(BASES[0])
        self._collate = {
            asked: Collator(self.tokenizer, _NoPicture(), for_generation=asked, task="caption", max_tokens=48)  # pyright: ignore
            for asked in (False, True)
        }

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, row: int, caption: int) -> Sample:
        """A row with one of its captions, without its picture."""
        return replace(read_sample(self.index, row, caption=caption), image=None)

    def batch(self, tower: PlayedTower | None, rows: list[tuple[int, int]], *, asked: bool = False) -> Batch:
        """Collates pairs of row and caption, and has the tower play their pictures."""
        batch = self._collate[asked]([self.sample(row, caption) for row, caption in rows])
        if tower is not None:
            tower.states = self.states.of([row for row, _ in rows])
        blank = torch.zeros(1, 1, 1, 1, dtype=DTYPE).expand(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE)
        # The collator, which saw no pictures, has all rows share one.
        present = torch.ones(len(rows), dtype=torch.bool)
        return replace(batch, pixel_values=blank, has_image=present, picture=None)


class _NoPicture:
    image_size = 4

    def __call__(self, image: Image.Image) -> Tensor:
        raise AssertionError


def scores(captions: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Of pairs of caption and truth: F1 of words of each kind; shares of right counts and relations."""
    right, counted = Counter[str](), Counter[str]()
    for pair in captions:
        said, true = (re.findall("[a-z]+", text.lower()) for text in pair)
        for kind, words in WORDS.items():
            a, b = (Counter(word for word in text if word in words) for text in (said, true))
            right[kind] += 2 * (a & b).total()
            counted[kind] += a.total() + b.total()
        numbers = [sum(word in WORDS["shape"] for word in text) for text in (said, true)]
        right["count"] += numbers[0] == numbers[1]
        counted["count"] += 1
        stated = [_relation(text) for text in pair]
        if stated[1]:
            right["relation"] += stated[0] == stated[1]
            counted["relation"] += 1
    return {kind: right[kind] / max(1, counted[kind]) for kind in GRANULARITIES}


def _relation(text: str) -> str:
    return next((words for words in RELATIONS if words in text.lower()), "")


def training_rows(split: Split, seed: int) -> list[tuple[int, int]]:
    """Every caption once, in an order of the seed's."""
    order = torch.randperm(len(split) * CAPTIONS_A_PICTURE, generator=torch.Generator().manual_seed(seed))
    return [divmod(int(number), CAPTIONS_A_PICTURE) for number in order]


def of_rows(count: int, at_most: int) -> list[range]:
    """Rows in batches."""
    return [range(first, min(first + at_most, count)) for first in range(0, count, at_most)]


Found = dict[str, Any]
