"""ScienceQA, QCM-A: reads the letter of an answer, and scores the nine columns of the papers.

The protocol is that of MemVP and ADEM-VL: a generation that names no choice is wrong, and counted as a parse
failure. LaVIN draws a choice at random there, and LLaVA lets the model explain first: numbers across
protocols are not comparable, nor are those with and without captions of the pictures
(``data.scienceqa.image_captions``), so say which beside a number. A caption makes no problem one of TXT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
"""Columns in the papers' order: subject, context, grade, all."""

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADE = re.compile(r"grade([1-9]|1[0-2])")
# After the letter a full stop that ends the word, or nothing more: "A dog" and "A.5" name no choice.
_LETTER = re.compile(rf"(?:\A\s*|(?<!\S){re.escape(SCIENCEQA_ANSWER_PREFIX)}\s+)([A-Z])(?:\.(?!\S)|\s*\Z)")
_NUM_NAMED = 3
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What scoring needs to know of a problem.

    Attributes:
        id: the sample's key.
        answer: number of the right choice, from 0.
        num_choices: 2 to 26.
        subject: ``natural science``, ``social science`` or ``language science``.
        grade: 1 to 12.
        has_hint: whether it comes with a text context.
        has_image: whether it comes with a picture.
    """

    id: str
    answer: int
    num_choices: int
    subject: str
    grade: int
    has_hint: bool
    has_image: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it counts in; a problem with a hint and a picture is in both TXT and IMG."""
        contexts = [name for name, has in (("TXT", self.has_hint), ("IMG", self.has_image)) if has]
        grades = "G1-6" if self.grade <= 6 else "G7-12"
        return _SUBJECTS[self.subject], *(contexts or ["NO"]), grades, "Avg"


@dataclass(frozen=True)
class Column:
    """Right answers among the problems of a column."""

    num_correct: int
    num_problems: int

    @property
    def percent(self) -> float | None:
        """Accuracy x100; None without problems."""
        return 100 * self.num_correct / self.num_problems if self.num_problems else None


@dataclass(frozen=True, kw_only=True)
class ScienceqaScores:
    """Scores over a set of problems.

    Attributes:
        columns: each of ``COLUMNS``, in this order.
        parse_failures: ids of the problems whose answer named no choice; all of them count as wrong.
        confusion: a matrix for each number of choices: a row for each right answer, a column for each answer
            given, and a last column for parse failures.
    """

    columns: dict[str, Column]
    parse_failures: tuple[str, ...]
    confusion: dict[int, list[list[int]]]

    @property
    def parse_failure_percent(self) -> float:
        """Parse failures x100 over all problems."""
        return 100 * len(self.parse_failures) / self.columns["Avg"].num_problems


def problem_of(record: Mapping[str, Any], key: str, has_image: bool) -> Problem:
    """The facts of a shard's record.

    Args:
        record: a problem with ``question``, ``choices``, ``answer``, ``subject``, ``grade`` and ``hint``.
        key: the sample's key.
        has_image: whether the problem comes with a picture: for the papers' columns, whether the record names
            an ``image``, also where the shard lacks it (``image_missing``).

    Raises:
        UserError: a field is missing, or is not what ScienceQA has there.
    """
    fields = ("question", "choices", "answer", "subject", "grade", "hint")
    if missing := [name for name in fields if name not in record]:
        raise UserError(f"{key}: not a problem of ScienceQA: lacks {', '.join(missing)}")
    question, choices, answer, subject, grade, hint = (record[name] for name in fields)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{key}: question {question!r} is no text")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise UserError(f"{key}: choices is not a list of 2 to {len(ascii_uppercase)} texts")
    if odd := [choice for choice in choices if not isinstance(choice, str)]:
        raise UserError(f"{key}: choice {odd[0]!r} is {type(odd[0]).__name__}, not a text")
    if not _is_choice(answer, len(choices)):
        raise UserError(f"{key}: answer {answer!r} is no number of its {len(choices)} choices, from 0")
    if not isinstance(subject, str) or subject not in _SUBJECTS:
        raise UserError(f"{key}: subject {subject!r} is none of {', '.join(_SUBJECTS)}")
    if not isinstance(grade, str) or not (parsed := _GRADE.fullmatch(grade)):
        raise UserError(f"{key}: grade {grade!r} is none of grade1 .. grade12")
    if not isinstance(hint, str | None):
        raise UserError(f"{key}: hint is {type(hint).__name__}, not a text")
    if not isinstance(caption := record.get("image_caption"), str | None):
        raise UserError(f"{key}: image_caption is {type(caption).__name__}, not a text")
    for text in (question, *choices, hint or "", caption or ""):
        if not text.isascii() and text.encode(errors="ignore").decode() != text:
            raise UserError(f"{key}: a text holds half a surrogate pair, which no tokenizer reads; mend it")
    return Problem(
        id=key,
        answer=answer,
        num_choices=len(choices),
        subject=subject,
        grade=int(parsed[1]),
        has_hint=bool(hint and hint.strip()),
        has_image=has_image,
    )


def read_letter(text: str, num_choices: int) -> int | None:
    """The choice that a generation names, from 0; None if it names none.

    A letter is one of A to Z at the start of the text, for the prompt may end in ``The answer is``, or
    anywhere after these three words. It is a word of its own: a full stop and then white space or the end
    follows, or the text ends. White space around it does not matter. `` A``, ``A.``, ``A. BECAUSE: ..`` and
    ``.. The answer is A.`` name A. ``Apple``, ``A dog``, ``(A)``, ``a`` and letters of other alphabets name
    nothing, and neither does a text that names two different letters, or one beyond the choices.

    Args:
        text: what the model wrote, with or without ``The answer is``.
        num_choices: choices of the problem.
    """
    letters = set(_LETTER.findall(text))
    if len(letters) != 1:
        return None
    choice = ascii_uppercase.index(letters.pop())
    return choice if choice < num_choices else None


def read_answers(problems: Iterable[Problem], texts: Iterable[tuple[str, str]]) -> dict[str, int | None]:
    """Reads the letter of every generation, for ``score``.

    Args:
        problems: the problems that were asked.
        texts: (id, what the model wrote), as gathered from all ranks.

    Raises:
        UserError: an id stands twice, or is of no problem.
    """
    by_id, texts = _by_id(problems), list(texts)
    if twice := [key for key, count in Counter(key for key, _ in texts).items() if count > 1]:
        raise UserError(f"{len(twice)} problems are answered more than once: {_named(twice)}")
    _refuse_others(by_id, [key for key, _ in texts], complete=False)
    return {key: read_letter(text, by_id[key].num_choices) for key, text in texts}


def score(problems: Iterable[Problem], predictions: Mapping[str, int | None]) -> ScienceqaScores:
    """Scores one prediction for each problem.

    Args:
        problems: at least one.
        predictions: the choice by the problem's id, from 0, whether it was read from a text or is the
            likeliest; None where there is none.

    Raises:
        UserError: no problem, an id given to two, problems without a prediction, predictions of no problem
            or beyond its choices.
    """
    by_id = _by_id(problems)
    _refuse_others(by_id, predictions, complete=True)
    wrong = [
        key
        for key, problem in by_id.items()
        if predictions[key] is not None and not _is_choice(predictions[key], problem.num_choices)
    ]
    if wrong:
        raise UserError(f"{len(wrong)} predictions are no number of a choice, from 0: {_named(wrong)}")
    num_problems, num_correct = Counter(), Counter()
    sizes = sorted({problem.num_choices for problem in by_id.values()})
    confusion = {size: [[0] * (size + 1) for _ in range(size)] for size in sizes}
    for key, problem in by_id.items():
        choice = predictions[key]
        num_problems.update(problem.columns)
        if choice == problem.answer:
            num_correct.update(problem.columns)
        confusion[problem.num_choices][problem.answer][-1 if choice is None else choice] += 1
    return ScienceqaScores(
        columns={name: Column(num_correct[name], num_problems[name]) for name in COLUMNS},
        parse_failures=tuple(key for key in by_id if predictions[key] is None),
        confusion=confusion,
    )


def markdown_header() -> str:
    """The two lines above ``markdown_row``'s."""
    return f"| Method | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}"


def markdown_row(name: str, scores: ScienceqaScores) -> str:
    """A row of a Markdown table: the name and the nine columns, 2 decimals; ``-`` without problems."""
    cells = [_on_one_line(name).replace("\\", "\\\\").replace("|", "\\|"), *_cells(scores, "-")]
    return f"| {' | '.join(cells)} |"


def latex_row(name: str, scores: ScienceqaScores) -> str:
    r"""A row of a LaTeX table: the name and the nine columns, 2 decimals; ``--`` without problems."""
    return rf"{' & '.join([_on_one_line(name).translate(_LATEX), *_cells(scores, '--')])} \\"


def _cells(scores: ScienceqaScores, empty: str) -> list[str]:
    percents = [scores.columns[name].percent for name in COLUMNS]
    return [empty if percent is None else f"{percent:.2f}" for percent in percents]


def _by_id(problems: Iterable[Problem]) -> dict[str, Problem]:
    problems = list(problems)
    if not problems:
        raise UserError("no problem to score")
    if twice := [key for key, count in Counter(p.id for p in problems).items() if count > 1]:
        raise UserError(f"{len(twice)} ids are given to more than one problem: {_named(twice)}")
    return {problem.id: problem for problem in problems}


def _refuse_others(by_id: Mapping[str, Problem], ids: Iterable[str], *, complete: bool) -> None:
    given = dict.fromkeys(ids)
    missing = [key for key in by_id if key not in given] if complete else []
    unknown = [key for key in given if key not in by_id]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(by_id)} problems have no prediction ({_named(missing)})")
    if unknown:
        parts.append(f"{len(unknown)} of {len(given)} predictions are of no problem here ({_named(unknown)})")
    if parts:
        raise UserError(f"{' and '.join(parts)}; are they of the same split?")


def _named(ids: list[str]) -> str:
    return ", ".join([*ids[:_NUM_NAMED], *(["..."] if len(ids) > _NUM_NAMED else [])])


def _is_choice(value: Any, num_choices: int) -> bool:
    # True is an int, and a letter is no number.
    return type(value) is int and 0 <= value < num_choices


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
