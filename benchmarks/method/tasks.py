"""What arms learn: rows of shards, what the tower saw of their pictures, and how answers are scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from arms import BASES, DTYPE
from tower import IMAGE_SIZE, PlayedTower, cached_states

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.data.collate import Collator, encode, encode_prompt, load_tokenizer
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.records import read_record
from dehvf_ds.demo import outcome
from dehvf_ds.demo.scenes import BACKGROUNDS, RADII
from dehvf_ds.evaluation.coco import CaptionScorer
from dehvf_ds.evaluation.decode import Decoding, decode
from dehvf_ds.model import DehvfForConditionalGeneration

DATA = Path("demo_data/method")
PICTURES = {
    "scenes": {"train": 3200, "val": 300, "test": 1000},
    "flickr8k": {"train": 3000, "val": 200, "test": 500},
}
"""How many of each split the tower is shown: the first ones."""
ROWS_AT_ONCE = 20
"""of an evaluation"""
WORDS = outcome.WORDS | {
    "size": set(RADII) - {"middle"},
    "background": set(BACKGROUNDS),
}
"""Words by what they hang on, from shallow to deep; relations and counts are looked at apart."""
RELATIONS = ("left of", "right of", "above", "below", "in a row", "in a column")

Found = dict[str, Any]
"""What was measured, by name."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an arm learns.

    Attributes:
        name: of its shards' directory.
        kind: the product's task.
        texts: of a training picture; each is a row of its own.
        max_tokens: longest row in training.
        rows: at most so many of each split are used.
        pictures: a set of ``PICTURES``; row i shows picture i.
        score: measures the answers of a model to a split.
        columns: what it finds, in the order of the tables, the loss apart.
    """

    name: str
    kind: Literal["caption", "scienceqa"]
    texts: int
    max_tokens: int
    rows: dict[str, int]
    pictures: str
    score: Callable[[DehvfForConditionalGeneration, PlayedTower | None, Split], Found]
    columns: tuple[str, ...]


class Split:
    """Rows of a task's split, and what the tower saw of their pictures."""

    def __init__(self, task: Task, name: str) -> None:
        self.task = task
        self.index = ShardIndex(DATA / "shards" / task.name / name)
        self.size = min(len(self.index), task.rows[name])
        shown = ShardIndex(DATA / "shards" / task.pictures / name)
        self.states = cached_states(
            shown, PICTURES[task.pictures][name], DATA / f"states/{task.pictures}-{name}"
        )
        self.tokenizer = load_tokenizer(BASES[0])
        settings: dict[str, Any] = {"task": task.kind, "max_tokens": task.max_tokens}
        made_by = Collator if task.kind == "caption" else _InWords
        settings: dict[str, Any] = {"task": task.kind, "max_tokens": task.max_tokens}
        self._train = made_by(self.tokenizer, _NoPicture(), **settings)  # pyright: ignore
        self._ask = replace(self._train, for_generation=True)

    def record(self, row: int, text: int = 0) -> dict[str, Any]:
        """A row's record, with one of its texts."""
        record = read_record(self.index.read(row)).record
        return record | {"caption": record["captions"][text]} if self.task.kind == "caption" else record

    def batch(
        self,
        tower: PlayedTower | None,
        rows: Sequence[tuple[int, int]],
        *,
        asked: bool = False,
    ) -> Batch:
        """Collates pairs of row and text, and has the tower play their pictures."""
        records = [self.record(*row) for row in rows]
        collate = self._ask if asked else self._train
        batch = collate([Sample(key="", image=None, record=record) for record in records])
        if tower is not None:
            tower.states = self.states.of([row for row, _ in rows])
        blank = torch.zeros(1, 1, 1, 1, dtype=DTYPE).expand(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE)
        # The collator, which saw no pictures, has all rows share one.
        present = torch.tensor([self.task.kind == "caption" or bool(record["image"]) for record in records])
        return replace(batch, pixel_values=blank, has_image=present, picture=None)

    def training_rows(self, seed: int) -> list[tuple[int, int]]:
        """Every text of every row once, in an order of the seed's."""
        order = torch.randperm(self.size * self.task.texts, generator=torch.Generator().manual_seed(seed))
        return [divmod(int(number), self.task.texts) for number in order]

    def parts(self) -> list[range]:
        """All rows in batches of an evaluation."""
        firsts = range(0, self.size, ROWS_AT_ONCE)
        return [range(first, min(first + ROWS_AT_ONCE, self.size)) for first in firsts]


class _NoPicture:
    image_size = 4


class _InWords(Collator):
    """Problems answered in words, not by a letter: this small a decoder does not learn letters in time."""

    def _row(self, sample: Sample) -> tuple[list[int], list[int]]:
        record = sample.record
        parts = (
            record["hint"],
            f"Question: {record['question']}",
            f"Options: {', '.join(record['choices'])}",
        )
        prompt = "\n".join((*filter(None, parts), "Answer:"))
        if self.for_generation:
            ids = encode_prompt(self.tokenizer, prompt)
            return ids, [IGNORE_INDEX] * len(ids)
        return encode(self.tokenizer, prompt, record["choices"][record["answer"]], self.max_tokens)


def score_captions(
    model: DehvfForConditionalGeneration,
    tower: PlayedTower | None,
    split: Split,
    *,
    java: bool,
) -> Found:
    """CIDEr of greedy captions; of drawn scenes, what they have right, too."""
    texts: list[str] = []
    records = [split.record(row) for row in range(split.size)]
    for rows in split.parts():
        batch = split.batch(tower, [(row, 0) for row in rows], asked=True)
        texts += [a.text for a in decode(model, batch, split.tokenizer, Decoding(max_new_tokens=40))]
    named = [(str(row), record) for row, record in enumerate(records)]
    scored = CaptionScorer(named, tokenizer="ptb" if java else "simple").score(texts)
    pairs = [(said, record["caption"]) for said, record in zip(texts, records, strict=True)]
    found: Found = {"CIDEr": scored.numbers["CIDEr"], "answers": pairs[:20]}
    return found if java else found | words_right(pairs)


def words_right(captions: Iterable[tuple[str, str]]) -> Found:
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
    return {kind: right[kind] / max(1, counted[kind]) for kind in (*WORDS, "count", "relation")}


def _relation(text: str) -> str:
    return next((words for words in RELATIONS if words in text.lower()), "")


SKILLS = {
    "Name a color": "color",  # of a thing or the background
    "Name a texture": "texture",
    "Name a shape": "shape",
    "Count objects": "count",
    "Read directions": "relation",
}
"""Questions about a picture by what they hang on; all others have none."""


def score_answers(model: DehvfForConditionalGeneration, tower: PlayedTower | None, split: Split) -> Found:
    """Shares of answers that are right word for word, of all and by what a question hangs on."""
    right, counted = Counter[str](), Counter[str]()
    pairs = []
    for rows in split.parts():
        batch = split.batch(tower, [(row, 0) for row in rows], asked=True)
        answers = decode(model, batch, split.tokenizer, Decoding(max_new_tokens=8))
        for row, answer in zip(rows, answers, strict=True):
            record = split.record(row)
            pairs.append((answer.text, record["choices"][record["answer"]]))
            for kind in ("all", SKILLS.get(record["skill"], "text")):
                right[kind] += pairs[-1][0] == pairs[-1][1]
                counted[kind] += 1
    return {kind: right[kind] / counted[kind] for kind in counted} | {"answers": pairs[:20]}


TASKS = {
    task.name: task
    for task in (
        Task(
            name="scenes",
            kind="caption",
            texts=5,
            max_tokens=48,
            rows={"train": 3200, "val": 200, "test": 300},
            pictures="scenes",
            score=lambda *of: score_captions(*of, java=False),
            columns=("CIDEr", *WORDS, "count", "relation"),
        ),
        Task(
            name="questions",
            kind="scienceqa",
            texts=1,
            max_tokens=128,
            rows=PICTURES["scenes"],
            pictures="scenes",
            score=score_answers,
            columns=("all", *SKILLS.values(), "text"),
        ),
        Task(
            name="flickr8k",
            kind="caption",
            texts=5,
            max_tokens=48,
            rows=PICTURES["flickr8k"],
            pictures="flickr8k",
            score=lambda *of: score_captions(*of, java=True),
            columns=("CIDEr",),
        ),
    )
}
