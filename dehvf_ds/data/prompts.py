"""What the model reads and what it is to answer: prompts and targets as text, conversations as token ids.

ScienceQA has the QCM form of MemVP and ADEM-VL (question, context, options); the target is the answer's
letter (A), optionally with the lecture and the solution (ALE, worded as in ScienceQA's own code). The caption
prompt is ours. Conversations are those of LLaVA and ShareGPT, written by the tokenizer's own chat template;
no visual token enters the sequence, so they are plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from string import ascii_uppercase
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import IGNORE_INDEX
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.shards import one_line
from dehvf_ds.data.text import is_text
from dehvf_ds.model.processing import bos_ids, text_ids, tokenizer_name

TextTask = Literal["caption", "scienceqa"]
"""Tasks of one prompt and one target."""
Task = Literal["caption", "scienceqa", "chat"]

Messages = Sequence[Mapping[str, str]]
"""Turns in order, each with ``role`` (``system``, ``user`` or ``assistant``) and ``content``."""

CAPTION_PROMPT = "Caption of the picture:"
SCIENCEQA_ANSWER_PREFIX = "The answer is"
"""Appended to the prompt in evaluation, so that the next token is the letter."""
QCM_A = ScienceqaConfig()
"""ScienceQA's default form: no caption of the picture, only the letter."""

TURN_FORM = '{"from": "human" or "gpt", "value": TEXT}'
"""A turn as LLaVA and ShareGPT write it, for messages."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{% if message.role == 'user' %}{{ 'USER: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""Ours, close to Vicuna's, for tokenizers without one: ``USER: q ASSISTANT: a</s> USER: ...``."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Marks that are never ordinary text ..
_MARK = (
    r"<(?:image|video)>|(?i:<\|?(?:image|img|video)[_ -]?(?:placeholder|here|token|pad|context|\d+)(?:\|?>)"
    r"|<\|(?:image|img|video|vision_start|vision_end)\|>|<im(?:age)?_(?:start|end)>|\[IMG\d*\]"
    r"|<img>[^<>\s][^<>]*</img>|<start_of_image>)"
)
# .. and those that also occur in HTML and code: marks only at the beginning or end of a turn.
_MARK_AT_ENDS = r"(?i:<\s*(?:image|img|video)\s*/?>|<img>\s*</img>|\[(?:image|picture)\])"
PLACEHOLDER = re.compile(
    rf"(?:\r?\n| )(?:{_MARK})|(?:{_MARK})(?:\r?\n| )?|\A\s*{_MARK_AT_ENDS}\s*|\s*{_MARK_AT_ENDS}\s*\Z"
)
"""Where other models put visual tokens in a question: ``<image>``, ``<video>``, and variants of them."""

_ZERO_WIDTH_SPACE = "\u200b"


def build_prompt(
    record: Mapping[str, Any],
    task: TextTask,
    *,
    prompt: str | None = None,
    scienceqa: ScienceqaConfig = QCM_A,
) -> str:
    """The text before the answer; it never ends in a space.

    ``prompt`` replaces ``CAPTION_PROMPT``; ScienceQA has its own form, with the record's ``image_caption``
    after the hint where ``scienceqa`` says so.
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
    """The text to learn, on one line: the record's chosen ``caption``, or ``The answer is X.``, followed by
    ``BECAUSE:``, lecture and solution where ``scienceqa`` says so.
    """
    if task == "caption":
        return " ".join(record["caption"].split())
    answer = f"{SCIENCEQA_ANSWER_PREFIX} {ascii_uppercase[int(record['answer'])]}."
    texts = [
        record.get("lecture") if scienceqa.lecture else None,
        record.get("solution") if scienceqa.solution else None,
    ]
    reasons = " ".join(" ".join(text for text in texts if text).split())
    return f"{answer} BECAUSE: {reasons}" if reasons else answer


def parse_conversation(record: Mapping[str, Any], *, needs_answer: bool = True) -> list[dict[str, str]]:
    """Reads ``conversations`` of a LLaVA or ShareGPT record: its turns, as chat templates take them.

    Speakers are human or user, gpt or assistant, and system, in any case. ``PLACEHOLDER`` is removed from the
    user's turns together with the line break or space beside it, and turns are stripped. A turn of the
    assistant before the first question answers nothing and is dropped, as in LLaVA's loader.

    Refused are records without turns, turns that are not of ``TURN_FORM`` or empty, and two turns in a row by
    one speaker; with ``needs_answer``, as in training, also a conversation without an answer.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        held = f"{type(turns).__name__}, not a list of {TURN_FORM}" if turns else "empty or missing"
        raise UserError(f"the conversation has no turns (conversations is {held})")
    messages = [_parse_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    roles = [message["role"] for message in messages]
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == before:
            raise UserError(f"turn {number} of the conversation: {role} speaks twice in a row")
    first = next((i for i, role in enumerate(roles) if role != "system"), None)
    kept = [i for i in range(len(turns)) if i != first or roles[i] != "assistant"]
    for i in kept:
        # Tested before the marks are removed: a question that is only ``<image>`` asks for a caption.
        matters = roles[i] == "user" or (needs_answer and roles[i] == "assistant")
        if matters and not is_text(turns[i]["value"]):
            what = "question" if roles[i] == "user" else "answer"
            raise UserError(f"turn {i + 1} of the conversation: the {what} is empty")
    if needs_answer and all(roles[i] != "assistant" for i in kept):
        raise UserError("the conversation has no turn of the assistant, so there is nothing to learn")
    return [messages[i] for i in kept]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Turns a conversation into ids and labels: the answers are supervised, each with its end-of-turn token.

    The text is rendered and tokenised as a whole. An answer's place is found by rendering the turns before
    it, as generation does, and the two must agree in text and in ids: otherwise the model would learn to
    continue a prompt that it never sees. Space that the template puts after an end-of-turn token is not
    supervised. Without a chat template ``PLAIN_CHAT_TEMPLATE`` is used; tokens beyond ``max_tokens`` are cut.

    A special token typed in a turn gets a zero-width space after its first character. It reads the same,
    but whoever types one can neither end a turn nor fake an answer.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer_name(tokenizer)}: gives no character offsets; it needs a tokenizer.json")
    messages = _defuse(tokenizer, messages)
    text = _render(tokenizer, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    bos = _own_bos(tokenizer)
    ids = [*bos, *encoding.input_ids]
    starts = [0] * len(bos) + [start for start, _ in encoding.offset_mapping]
    labels = [IGNORE_INDEX] * len(ids)
    for prompt, end in _answer_places(tokenizer, messages, text):
        prompt_ids = [*bos, *text_ids(tokenizer, prompt)]
        first = len(prompt_ids)
        if first >= max_tokens:
            break
        if ids[:first] != prompt_ids:
            raise UserError(
                f"{tokenizer_name(tokenizer)}: an answer joins with the tokens before it, which generation "
                "would not see; its chat template cannot be used for training by turns"
            )
        last = next((i for i in range(first, len(ids)) if starts[i] >= end), len(ids))
        labels[first:last] = ids[first:last]
    # Nothing comes before the first token to predict it from.
    labels[0] = IGNORE_INDEX
    return ids[:max_tokens], labels[:max_tokens]


def encode_chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids to generate the assistant's next turn from; a closing answer in ``messages`` is left out.

    Never cut: a conversation without its end asks another question.
    """
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = _render(tokenizer, _defuse(tokenizer, before), for_generation=True)
    return [*_own_bos(tokenizer), *text_ids(tokenizer, text)]


def _parse_turn(turn: Any, number: int) -> dict[str, str]:
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    role = _ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise UserError(
            f"turn {number} of the conversation is {turn!r:.80}, not {TURN_FORM}; known speakers: "
            f"{', '.join(_ROLES)}"
        )
    return {"role": role, "content": (PLACEHOLDER.sub("", text) if role == "user" else text).strip()}


def _answer_places(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str
) -> Iterator[tuple[str, int]]:
    """Yields, for each answer in ``text``, everything before it and the character where it ends."""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], for_generation=True)
        answered = _render(tokenizer, messages[: turn + 1])
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise UserError(
                f"{tokenizer_name(tokenizer)}: its chat template changes a turn when others follow it, "
                "so it cannot be used for training by turns"
            )
        yield prompt, len(answered.rstrip())


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, for_generation: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE,
            add_generation_prompt=for_generation,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{tokenizer_name(tokenizer)}: its chat template fails: {one_line(error)}") from None
    assert isinstance(text, str)
    return text


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The begin of text, unless the tokenizer's own template writes it."""
    return () if tokenizer.chat_template else bos_ids(tokenizer)


def _defuse(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[dict[str, str]]:
    """The messages, with special tokens typed in them broken up by a zero-width space."""
    pattern = _special_tokens(tokenizer)
    return [
        {
            "role": message["role"],
            "content": pattern.sub(lambda m: m[0][0] + _ZERO_WIDTH_SPACE + m[0][1:], message["content"]),
        }
        for message in messages
    ]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted(added.union(tokenizer.all_special_tokens), key=len, reverse=True)
    # The empty lookahead matches nowhere, for tokenizers without special tokens.
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
