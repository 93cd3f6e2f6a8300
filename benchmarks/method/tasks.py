"""What arms learn: rows of shards, what the tower saw of their pictures, and how answers are scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from arms import BASES, DTYPE
from tower import IMAGE_SIZE, PlayedTower, States, cached_states

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.data.collate import Collator, load_tokenizer
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.records import CheckedRecord, read_record
from dehvf_ds.demo import outcome
from dehvf_ds.demo.scenes import BACKGROUNDS, RADII
from dehvf_ds.evaluation.coco import CaptionScorer
from dehvf_ds.evaluation.decode import Decoding, decode
from dehvf_ds.model import DehvfForConditionalGeneration

DATA = Path("demo_data/method")
PICTURES = {
    "scenes": {"train": 3200, "val": 300, "test": 1000},
    "flickr8k": {"all": 8000},
}
"""How many of each split the tower is shown at most: the first ones."""
ROWS_AT_ONCE = {"cpu": 20, "cuda": 100}
"""of an evaluation, by device"""
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
        texts: of a row; each is learnt for itself, a conversation as a whole.
        max_tokens: longest row in training.
        rows: at most so many of each split are used.
        folds: if not 0, there is one set of pictures, and a seed holds out every so many-th for itself.
        pictures: a set of ``PICTURES``; row i shows picture i.
        answer: of a model to every row of a split, or to every question of its rows.
        score: measures such answers; needs no model and no device.
        columns: what it finds, in the order of the tables, the loss apart.
    """

    name: str
    kind: Literal["caption", "chat"]
    texts: int
    max_tokens: int
    rows: dict[str, int]
    pictures: str
    answer: Callable[[DehvfForConditionalGeneration, PlayedTower | None, Split], list[str]]
    score: Callable[[Split, Sequence[str]], Found]
    columns: tuple[str, ...]
    folds: int = 0


class Split:
    """Rows of a task's split, and what the tower saw of their pictures."""

    def __init__(self, task: Task, name: str, seed: int = 0, device: str = "cpu") -> None:
        self.task = task
        self.device = device
        stored = "all" if task.folds else name
        self.index = ShardIndex(DATA / "shards" / task.name / stored)
        rows = range(min(len(self.index), task.rows[stored]))
        if task.folds:
            rows = [row for row in rows if (row % task.folds == seed % task.folds) == (name != "train")]
        self.rows = rows
        self._stored = stored
        self.tokenizer = load_tokenizer(BASES[0])
        settings: dict[str, Any] = {"task": task.kind, "max_tokens": task.max_tokens}
        self._train = Collator(self.tokenizer, _NoPicture(), **settings)  # pyright: ignore
        self._ask = replace(self._train, for_generation=True)

    @cached_property
    def states(self) -> States:
        """What the tower saw, computed where no run has asked for it yet."""
        kind = self.task.pictures
        shown = ShardIndex(DATA / "shards" / kind / self._stored)
        count = min(PICTURES[kind][self._stored], len(shown))
        return cached_states(shown, count, DATA / f"states/{kind}-{self._stored}", self.device)

    def read(self, row: int) -> CheckedRecord:
        """A row's record."""
        return read_record(self.index.read(self.rows[row]))

    def batch(
        self, tower: PlayedTower | None, rows: Sequence[tuple[int, int]], *, asked: bool = False
    ) -> Batch:
        """Collates pairs of row and text, and has the tower play their pictures.

        A conversation is learnt as a whole; ``asked``, it is one question alone, whose number the text is.
        """
        samples, present = [], []
        for row, text in rows:
            record, kind, _, messages = self.read(row)
            if kind == "caption":
                record = record | {"caption": record["captions"][text]}
            elif asked:
                messages = messages[2 * text : 2 * text + 1]
            samples.append(Sample(key="", image=None, record=record, messages=messages))
            present.append(kind == "caption" or "image" in record)
        batch = (self._ask if asked else self._train)(samples)
        if tower is not None:
            tower.play(self.states, [self.rows[row] for row, _ in rows], self.device)
        # The collator, which saw no pictures, has all rows share one.
        batch = replace(batch, has_image=torch.tensor(present), picture=None).with_facts().to(self.device)
        blank = torch.zeros(1, 1, 1, 1, dtype=DTYPE, device=self.device)
        return replace(batch, pixel_values=blank.expand(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE))

    def training_rows(self, seed: int) -> list[tuple[int, int]]:
        """Every text of every row once, in an order of the seed's."""
        order = torch.randperm(
            len(self.rows) * self.task.texts, generator=torch.Generator().manual_seed(seed)
        )
        return [divmod(number, self.task.texts) for number in order.tolist()]

    def parts(self) -> list[range]:
        """All rows in batches of an evaluation."""
        size = ROWS_AT_ONCE[self.device]
        return [range(first, min(first + size, len(self.rows))) for first in range(0, len(self.rows), size)]


class _NoPicture:
    image_size = 4


def write_captions(
    model: DehvfForConditionalGeneration, tower: PlayedTower | None, split: Split
) -> list[str]:
    """Greedy captions."""
    texts: list[str] = []
    for rows in split.parts():
        batch = split.batch(tower, [(row, 0) for row in rows], asked=True)
        texts += [a.text for a in decode(model, batch, split.tokenizer, Decoding(max_new_tokens=40))]
    return texts


def score_captions(split: Split, texts: Sequence[str], *, java: bool) -> Found:
    """CIDEr; of drawn scenes, what captions have right, too."""
    records = [split.read(row).record for row in range(len(split.rows))]
    named = [(str(row), record) for row, record in enumerate(records)]
    scored = CaptionScorer(named, tokenizer="ptb" if java else "simple").score(texts)
    found: Found = {"CIDEr": scored.numbers["CIDEr"]}
    if java:
        return found
    pairs = ((said, record["captions"][0]) for said, record in zip(texts, records, strict=True))
    return found | words_right(pairs)


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
    "Which color is the background": "background",
    "Which color": "color",
    "Which texture": "texture",
    "Which shape": "shape",
    "How many": "count",
    "Where": "relation",
}
"""What a question about a picture hangs on, by how it begins."""


def asked(split: Split) -> list[tuple[int, int]]:
    """Every question, by its row and its number in the conversation."""
    counts = (len(split.read(row).messages) // 2 for row in range(len(split.rows)))
    return [(row, turn) for row, count in enumerate(counts) for turn in range(count)]


def answer_questions(
    model: DehvfForConditionalGeneration, tower: PlayedTower | None, split: Split
) -> list[str]:
    """Answers to questions that are each asked alone."""
    every, size, said = asked(split), 2 * ROWS_AT_ONCE[split.device], []
    for first in range(0, len(every), size):
        batch = split.batch(tower, every[first : first + size], asked=True)
        said += [a.text for a in decode(model, batch, split.tokenizer, Decoding(max_new_tokens=8))]
    return said


def score_answers(split: Split, answers: Sequence[str]) -> Found:
    """Shares of answers that are right word for word, of all and by what a question hangs on.

    Those of rows without a picture, which a text answers, are "text".
    """
    right, counted = Counter[str](), Counter[str]()
    read = [split.read(row) for row in range(len(split.rows))]
    for (row, turn), answer in zip(asked(split), answers, strict=True):
        question, true = (message["content"] for message in read[row].messages[2 * turn : 2 * turn + 2])
        kinds = (kind for begins, kind in SKILLS.items() if question.startswith(begins))
        kind = next(kinds) if "image" in read[row].record else "text"
        for each in ("all", kind):
            right[each] += answer == true
            counted[each] += 1
    return {kind: right[kind] / counted[kind] for kind in counted}


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
            answer=write_captions,
            score=partial(score_captions, java=False),
            columns=("CIDEr", *WORDS, "count", "relation"),
        ),
        Task(
            name="questions",
            kind="chat",
            texts=1,
            max_tokens=160,
            rows={"train": 3200, "val": 200, "test": 300},
            pictures="scenes",
            answer=answer_questions,
            score=score_answers,
            columns=("all", *SKILLS.values(), "text"),
        ),
        Task(
            name="flickr8k",
            kind="caption",
            texts=5,
            max_tokens=48,
            rows=PICTURES["flickr8k"],
            folds=4,
            pictures="flickr8k",
            answer=write_captions,
            score=partial(score_captions, java=True),
            columns=("CIDEr",),
        ),
    )
}
