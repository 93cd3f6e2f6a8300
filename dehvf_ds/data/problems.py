"""A problem of ScienceQA: what training and scoring need of its record, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.text import is_text

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADE = re.compile(r"grade([1-9]|1[0-2])")


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


def problem_of(record: Mapping[str, Any], key: str, has_image: bool) -> Problem:
    """The facts of a problem's record; whatever training or scoring would stumble over is refused.

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
    if not is_text(question):
        raise UserError(f"{key}: question is {_shown(question)}, not a text")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise UserError(f"{key}: choices is not a list of 2 to {len(ascii_uppercase)} texts")
    if wrong := [choice for choice in choices if not is_text(choice)]:
        raise UserError(f"{key}: a choice is {_shown(wrong[0])}, not a text")
    if not is_choice(answer, len(choices)):
        raise UserError(f"{key}: answer {answer!r} is no number of its {len(choices)} choices, from 0")
    if not isinstance(subject, str) or subject not in _SUBJECTS:
        raise UserError(f"{key}: subject {subject!r} is none of {', '.join(_SUBJECTS)}")
    if not isinstance(grade, str) or not (parsed := _GRADE.fullmatch(grade)):
        raise UserError(f"{key}: grade {grade!r} is none of grade1 .. grade12")
    for name in ("hint", "lecture", "solution", "image_caption"):
        if not isinstance(text := record.get(name), str | None):
            raise UserError(f"{key}: {name} is {type(text).__name__}, not a text")
    return Problem(
        id=key,
        answer=answer,
        num_choices=len(choices),
        subject=subject,
        grade=int(parsed[1]),
        has_hint=bool(hint and hint.strip()),
        has_image=has_image,
    )


def is_choice(value: Any, num_choices: int) -> bool:
    """Whether a value is the number of a choice, from 0."""
    # True is an int, and a letter is no number.
    return type(value) is int and 0 <= value < num_choices


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__
