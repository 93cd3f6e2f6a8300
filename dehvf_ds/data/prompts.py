"""What the model reads and what it is to answer, as text. Pure functions of a record.

ScienceQA's is the QCM form of MemVP and ADEM-VL (question, context, options); the target is the answer's
letter (A), on demand with the lecture and the solution (ALE, the words of ScienceQA's own code). The caption
prompt is ours. Conversations are in ``chat.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Literal

from dehvf_ds.config import ScienceqaConfig

TextTask = Literal["caption", "scienceqa"]
"""Tasks of one prompt and one target."""
Task = Literal["caption", "scienceqa", "chat"]

CAPTION_PROMPT = "Caption of the picture:"
SCIENCEQA_ANSWER_PREFIX = "The answer is"
"""Appended to the prompt in evaluation, so that the next token is the letter."""
QCM_A = ScienceqaConfig()
"""ScienceQA's default form: no caption of the picture, the letter alone."""


def build_prompt(
    record: Mapping[str, Any],
    task: TextTask,
    *,
    prompt: str | None = None,
    scienceqa: ScienceqaConfig = QCM_A,
) -> str:
    """The text before the answer; it never ends in a space.

    Args:
        record: the sample's record.
        task: the task.
        prompt: instruction of ``caption``; None takes ``CAPTION_PROMPT``. ScienceQA has its own form.
        scienceqa: whether the record's ``image_caption`` goes into ScienceQA's context.
    """
    if task == "caption":
        return (CAPTION_PROMPT if prompt is None else prompt).rstrip()
    image_caption = record.get("image_caption") if scienceqa.image_captions else None
    return scienceqa_prompt(record, image_caption=image_caption)


def build_target(record: Mapping[str, Any], task: TextTask, *, scienceqa: ScienceqaConfig = QCM_A) -> str:
    """The text to learn: the record's chosen ``caption``, or ScienceQA's answer.

    Args:
        record: the sample's record.
        task: the task.
        scienceqa: what ScienceQA's answer goes on with.
    """
    if task == "caption":
        return caption_target(record["caption"])
    return scienceqa_target(record, lecture=scienceqa.lecture, solution=scienceqa.solution)


def caption_target(caption: str) -> str:
    """A caption on one line, single spaces between its words."""
    return _on_one_line(caption)


def scienceqa_prompt(record: Mapping[str, Any], *, image_caption: str | None = None) -> str:
    """The QCM prompt of a ScienceQA problem; ends in ``Response:``.

    Args:
        record: a problem with ``question``, ``choices`` and perhaps ``hint``.
        image_caption: a text that describes the picture; follows the hint in the context.
    """
    context = " ".join(text.strip() for text in (record.get("hint"), image_caption) if text and text.strip())
    return (
        f"Question: {record['question']}\nContext: {context or 'N/A'}\n"
        f"Options: {_options(record['choices'])}\nResponse:"
    )


def scienceqa_target(record: Mapping[str, Any], *, lecture: bool = False, solution: bool = False) -> str:
    """``The answer is X.``, X the letter of the right choice; then what the problem's teacher says.

    Args:
        record: a problem with ``answer``, the right choice's number from 0.
        lecture: go on with ``BECAUSE:`` and the record's ``lecture``, where it has one.
        solution: the same for its ``solution``; both make QCM-ALE.
    """
    answer = f"{SCIENCEQA_ANSWER_PREFIX} {ascii_uppercase[int(record['answer'])]}."
    texts = [(record.get("lecture") if lecture else None), (record.get("solution") if solution else None)]
    reasons = _on_one_line(" ".join(text for text in texts if text))
    return f"{answer} BECAUSE: {reasons}" if reasons else answer


def _options(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
