"""What the model reads and what it is to answer, as text. Pure functions of a record.

ScienceQA's is the QCM form of MemVP and ADEM-VL (question, context, options); the target is the answer's
letter (A), on demand with the lecture and the solution (ALE, the words of ScienceQA's own code). The caption
prompt is ours. Conversations are in ``chat.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        scienceqa: whether the record's ``image_caption`` goes into ScienceQA's context, behind the hint.
    """
    if task == "caption":
        return (CAPTION_PROMPT if prompt is None else prompt).rstrip()
    contexts = [record.get("hint"), record.get("image_caption") if scienceqa.image_captions else None]
    context = " ".join(text.strip() for text in contexts if text and text.strip())
    options = zip(ascii_uppercase, record["choices"], strict=False)
    return (
        f"Question: {record['question']}\nContext: {context or 'N/A'}\n"
        f"Options: {' '.join(f'({letter}) {choice}' for letter, choice in options)}\nResponse:"
    )


def build_target(record: Mapping[str, Any], task: TextTask, *, scienceqa: ScienceqaConfig = QCM_A) -> str:
    """The text to learn: the record's chosen ``caption`` on one line, or ScienceQA's answer."""
    if task == "caption":
        return " ".join(record["caption"].split())
    return scienceqa_target(record, scienceqa)


def scienceqa_target(record: Mapping[str, Any], form: ScienceqaConfig = QCM_A) -> str:
    """``The answer is X.``, then ``BECAUSE:`` and the record's lecture and solution, as the form asks."""
    answer = f"{SCIENCEQA_ANSWER_PREFIX} {ascii_uppercase[int(record['answer'])]}."
    texts = [
        record.get("lecture") if form.lecture else None,
        record.get("solution") if form.solution else None,
    ]
    reasons = " ".join(" ".join(text for text in texts if text).split())
    return f"{answer} BECAUSE: {reasons}" if reasons else answer
