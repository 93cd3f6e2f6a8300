"""What the model reads and what it is to answer, as text. Pure functions of a record.

ScienceQA's is the QCM-A form of MemVP and ADEM-VL (question, context, options; the answer's letter).
The caption prompt is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Literal

Task = Literal["caption", "scienceqa"]

CAPTION_PROMPT = "Caption of the picture:"
SCIENCEQA_ANSWER_PREFIX = "The answer is"
"""Appended to the prompt in evaluation, so that the next token is the letter."""


def build_prompt(
    record: Mapping[str, Any], task: Task, *, prompt: str | None = None, image_caption: str | None = None
) -> str:
    """The text before the answer; it never ends in a space.

    Args:
        record: the sample's record.
        task: the task.
        prompt: instruction of ``caption``; None takes ``CAPTION_PROMPT``. ScienceQA has its own form.
        image_caption: a text that describes the picture, put in ScienceQA's context.
    """
    if task == "caption":
        return (CAPTION_PROMPT if prompt is None else prompt).rstrip()
    return scienceqa_prompt(record, image_caption=image_caption)


def build_target(record: Mapping[str, Any], task: Task) -> str:
    """The text to learn: the record's chosen ``caption``, or ScienceQA's answer sentence."""
    if task == "caption":
        return caption_target(record["caption"])
    return scienceqa_target(record)


def caption_target(caption: str) -> str:
    """A caption on one line, single spaces between its words."""
    return " ".join(caption.split())


def scienceqa_prompt(record: Mapping[str, Any], *, image_caption: str | None = None) -> str:
    """The QCM prompt of a ScienceQA problem; ends in ``Response:``."""
    context = " ".join(text.strip() for text in (record.get("hint"), image_caption) if text and text.strip())
    return (
        f"Question: {record['question']}\nContext: {context or 'N/A'}\n"
        f"Options: {_options(record['choices'])}\nResponse:"
    )


def scienceqa_target(record: Mapping[str, Any]) -> str:
    """``The answer is X.``, X the letter of the right choice."""
    return f"{SCIENCEQA_ANSWER_PREFIX} {ascii_uppercase[int(record['answer'])]}."


def _options(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
