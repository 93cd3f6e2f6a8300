"""One check for every sample's record, whether shards are built, adopted, verified or read.

A caption row always has a picture. A row of another task is text only if its shard holds no picture for it
and its record mentions none (or says ``image_missing``), so that no row is trained blind. ScienceQA problems
must have all that training and scoring need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, NamedTuple

from dehvf_ds.config import UserError
from dehvf_ds.data.prompts import PLACEHOLDER, Messages, Task, parse_conversation
from dehvf_ds.data.shards import (
    BAD_CHAT,
    BAD_PROBLEM,
    BAD_RECORD,
    BAD_TEXT,
    NO_CAPTION,
    NO_PICTURE,
    NO_PICTURES,
    SEVERAL_PICTURES,
    UNDECODABLE,
    DamagedSample,
    one_line,
    picture_name,
)
from dehvf_ds.data.text import clean_text, decode_text, is_caption, is_null, is_text, is_value, parse_json

PICTURE_FIELD = re.compile(
    r"(?:image|img|picture|pic|photo|video|frame|media)s?"
    r"[_ -]?(?:path|file|file[_ -]?name|name|url|uri|src|id|bytes|data|base64|b64)?s?"
    r"|file[_ -]?(?:name|path)s?",
    re.IGNORECASE,
)
"""Fields by which a record mentions a picture or video that belongs to it."""

_HALF_EMOJI = re.compile("[\ud800-\udfff]")
# The sign for undecodable bytes, and Windows-1252 that was read as Latin-1.
_LOST = re.compile("[\ufffd\x80-\x9f]")
_TASK_FIELDS = ("captions", "conversations", "question")
_PROBLEM_FIELDS = ("question", "choices", "answer", "subject", "grade", "hint")
_PROBLEM_TEXTS = ("question", "hint", "lecture", "solution", "image_caption")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADE = re.compile(r"grade([1-9]|1[0-2])")


class CheckedRecord(NamedTuple):
    """A usable record, cleaned: captions are in ``captions``, a conversation's parsed turns in ``messages``.

    ``notes`` say what is odd in it or was corrected, in words that can be counted.
    """

    record: dict[str, Any]
    task: Task
    notes: tuple[str, ...] = ()
    messages: Messages = ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What scoring needs of a ScienceQA problem; ``id`` is the sample's key, ``answer`` counts from 0."""

    id: str
    answer: int
    num_choices: int
    subject: str
    grade: int
    has_hint: bool
    has_image: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The score columns it counts in; a problem with a hint and a picture is in both TXT and IMG."""
        contexts = [name for name, has in (("TXT", self.has_hint), ("IMG", self.has_image)) if has]
        grades = "G1-6" if self.grade <= 6 else "G7-12"
        return _SUBJECTS[self.subject], *(contexts or ["NO"]), grades, "Avg"


def read_record(members: Mapping[str, Any]) -> CheckedRecord:
    """Parses and checks the record of a sample, as ``parse_members`` returns it.

    A caption in a ``.txt``, or alone in ``caption``, becomes ``captions``. A ``DamagedSample`` says why the
    sample cannot be used.
    """
    try:
        record, notes = _parse(members)
        picture = picture_name(members)
        if picture is not None and not members[picture]:
            raise DamagedSample("a picture of 0 bytes", UNDECODABLE)
        kinds = (name for name in members if not name.startswith("__") and picture is None)
        if odd := [name for name in kinds if name.rpartition(".")[2] not in NO_PICTURES]:
            raise DamagedSample(f".{odd[0]} is not a supported picture format; convert it", NO_PICTURE)
        checked = check_record(record, has_picture=picture is not None)
    except DamagedSample as error:
        raise DamagedSample(f"{members.get('__url__', 'sample')}: {error}", error.reason) from error
    return checked._replace(notes=(*notes, *checked.notes))


def check_record(record: dict[str, Any], *, has_picture: bool) -> CheckedRecord:
    """Cleans a record in place; a ``DamagedSample`` is one that cannot be trained on or scored."""
    notes, messages = _gather_captions(record), ()
    if record.get("captions"):
        task: Task = "caption"
    elif "conversations" in record:
        task = "chat"
    elif "question" in record or "choices" in record:
        task = "scienceqa"
    else:
        fields = ", ".join(map(str, list(record)[:8])) or "nothing"
        what = "has no caption, nor conversations, nor a question with choices"
        raise DamagedSample(f"{what} (its record holds {fields})", NO_CAPTION)
    if not has_picture:
        _require_no_picture(record, task)
    elif task != "caption":
        pictures_named(record)
    try:
        # Half an emoji in any other field would fail when the record is written.
        if _HALF_EMOJI.search(written := json.dumps(record, ensure_ascii=False)):
            raise ValueError("holds half an emoji (a lone surrogate)")
        if _LOST.search(written):
            notes.append("text with U+FFFD or U+0080 to U+009F in it, a character that was lost before")
        for field in _PROBLEM_TEXTS:
            if isinstance(text := record.get(field), str):
                record[field] = clean_text(text)
        if task == "scienceqa" and isinstance(choices := record.get("choices"), list):
            record["choices"] = [clean_text(c) if isinstance(c, str) else c for c in choices]
        if task == "chat":
            messages, odd = _check_chat(record, has_picture)
            notes += odd
    except ValueError as error:
        raise DamagedSample(f"its text {one_line(error)}; correct it", BAD_TEXT) from None
    if task == "scienceqa":
        if has_picture and not record.get("image"):
            # Scores distinguish problems with a picture by this field.
            record["image"] = "image"
        problem = problem_of(record, "its record", has_picture)
        if record["choices"].count(record["choices"][problem.answer]) > 1:
            notes.append("problem whose right choice occurs twice among its choices")
    return CheckedRecord(record, task, tuple(notes), messages)


def text_lengths(record: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Number of captions, and the characters of each example's text without its prompt (for bucketing)."""
    if captions := record.get("captions"):
        return len(captions), tuple(map(len, captions))
    if turns := record.get("conversations"):
        return 0, (sum(len(turn["value"]) for turn in turns),)
    texts = [record["question"], record["hint"] or "", *record["choices"]]
    return 0, (sum(map(len, texts)),)


def pictures_named(record: Mapping[str, Any]) -> list[str]:
    """The file that a record's ``image`` or ``images`` names, if any; several are a ``DamagedSample``."""
    values = (record.get("image"), record.get("images"))
    found = [name for value in values for name in (value if isinstance(value, list | tuple) else [value])]
    if wrong := [name for name in found if not isinstance(name, str | None)]:
        raise DamagedSample(f"the picture's name {wrong[0]!r:.60} is not a text", NO_PICTURE)
    names = list(dict.fromkeys(filter(None, found)))
    if len(names) > 1:
        raise DamagedSample(f"{len(names)} pictures; one picture a row is supported", SEVERAL_PICTURES)
    return names


def problem_of(record: Mapping[str, Any], key: str, has_image: bool) -> Problem:
    """The facts of a problem's record; a ``DamagedSample`` says what training or scoring would fail on.

    In the papers' columns ``has_image`` is whether the record names one, also where the shard lacks it
    (``image_missing``).
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise DamagedSample(f"{key}: {message}", BAD_PROBLEM)

    missing = [name for name in _PROBLEM_FIELDS if name not in record]
    require(not missing, f"not a problem of ScienceQA: lacks {', '.join(missing)}")
    question, choices, answer, subject, grade, hint = (record[name] for name in _PROBLEM_FIELDS)
    most = len(ascii_uppercase)
    listed = isinstance(choices, list | tuple) and 2 <= len(choices) <= most
    require(listed, f"choices is not a list of 2 to {most} texts")
    for name, text in (("question", question), *(("a choice", choice) for choice in choices)):
        require(is_text(text), f"{name} is {text!r:.40}, not a text")
    # True is an int, and a letter is no number.
    numbered = type(answer) is int and 0 <= answer < len(choices)
    require(numbered, f"answer {answer!r:.40} is not an index into its {len(choices)} choices, from 0")
    require(str(subject) in _SUBJECTS, f"subject {subject!r:.40} is none of {', '.join(_SUBJECTS)}")
    parsed = _GRADE.fullmatch(str(grade))
    for name in _PROBLEM_TEXTS[1:]:
        text = record.get(name)
        require(isinstance(text, str | None), f"{name} is {type(text).__name__}, not a text")
    if parsed is None:
        raise DamagedSample(f"{key}: grade {grade!r:.40} is none of grade1 .. grade12", BAD_PROBLEM)
    return Problem(
        id=key,
        answer=answer,
        num_choices=len(choices),
        subject=subject,
        grade=int(parsed[1]),
        has_hint=bool(hint and hint.strip()),
        has_image=has_image,
    )


def _parse(members: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record with the caption of a ``.txt`` in it, and notes on that."""
    try:
        record = parse_json(decode_text(members["json"])) if "json" in members else {}
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if "txt" not in members:
            return record, []
        if any(field in record for field in _TASK_FIELDS):
            return record, [".txt beside a record that has its own texts, not read"]
        text = decode_text(members["txt"])
    except (ValueError, RecursionError) as error:
        reason = BAD_TEXT if "UTF-8" in str(error) else BAD_RECORD
        raise DamagedSample(f"its text is not usable: {one_line(error)}", reason) from error
    notes = []
    if sum(bool(line.strip()) for line in text.splitlines()) > 1:
        notes.append("caption of several lines in a .txt, read as one caption")
    if isinstance(caption := record.get("caption"), str) and caption.split() != text.split():
        notes.append("caption in a .txt that differs from its .json's, which is not read")
    record["captions"] = [text]
    return record, notes


def _gather_captions(record: dict[str, Any]) -> list[str]:
    """Puts a record's captions into ``captions``, clean and without empty ones; returns notes."""
    captions = record.get("captions")
    if "caption" in record and not any(field in record for field in _TASK_FIELDS):
        captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
    elif "captions" not in record:
        return []
    if not isinstance(captions, list | tuple):
        raise DamagedSample(f"captions is {type(captions).__name__}, not a list of texts", NO_CAPTION)
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise DamagedSample(f"has a caption that is no text ({wrong[0]!r:.40})", NO_CAPTION)
    kept = [caption for caption in captions if is_caption(caption)]
    if captions and not kept:
        raise DamagedSample(f"has only an empty caption ({captions[0]!r:.40})", NO_CAPTION)
    if values := [caption for caption in kept if is_value(caption)]:
        what = f"its caption is a list or another value written as text ({values[0]!r:.40})"
        raise DamagedSample(f"{what}; write each caption as a plain text of its own", BAD_TEXT)
    try:
        record["captions"] = [clean_text(caption) for caption in kept]
    except ValueError as error:
        raise DamagedSample(f"its caption {one_line(error)}; correct it", BAD_TEXT) from None
    return ["empty caption beside others left out"] * (len(captions) - len(kept))


def _require_no_picture(record: dict[str, Any], task: Task) -> None:
    """Refuses a row without a picture that is not text only by intent."""
    status, failed = record.get("status"), ""
    if status not in (None, "success"):
        failed = f" (its download: {status}, {record.get('error_message')})"
    if task == "caption":
        what = "a caption without a picture"
    elif record.get("image_missing") is True:
        return
    elif str(status).startswith("failed_to"):
        what = "its picture is missing"
    elif named := [
        f"{field}: {value!r:.60}"
        for field, value in record.items()
        if PICTURE_FIELD.fullmatch(str(field)) and value not in (None, "", [], {})
    ]:
        what = f"its record names a picture ({named[0]}), but the sample holds none"
    elif marks := list(filter(None, map(PLACEHOLDER.search, _asked_texts(record)))):
        what = f"its text mentions a picture ({marks[0][0].strip()}), but the sample holds none"
    else:
        return
    raise DamagedSample(f"{what}{failed}", NO_PICTURE)


def _asked_texts(record: dict[str, Any]) -> list[str]:
    """What a row asks, in a question or a conversation that is not checked yet."""
    turns = record.get("conversations")
    turns = [turn for turn in (turns if isinstance(turns, list) else ()) if isinstance(turn, dict)]
    speakers = ("human", "user", "system")
    asked = [turn.get("value") for turn in turns if str(turn.get("from")).strip().lower() in speakers]
    return [text for text in (*asked, record.get("question"), record.get("hint")) if isinstance(text, str)]


def _check_chat(record: dict[str, Any], has_picture: bool) -> tuple[Messages, list[str]]:
    turns = record["conversations"]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            turn["value"] = clean_text(turn["value"])
    try:
        messages = parse_conversation(record)
    except UserError as error:
        raise DamagedSample(str(error), BAD_CHAT) from None
    marks = sum(len(PLACEHOLDER.findall(text)) for text in _asked_texts(record))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = {
        "turn of the assistant before a question dropped": len(messages) < len(turns),
        "chat with several <image> for its one picture": has_picture and marks > 1,
        "answer that is the word nan or null": any(map(is_null, answers)),
        "answer with a mark such as <image> in it, learnt as text": any(map(PLACEHOLDER.search, answers)),
    }
    return messages, [note for note, is_there in found.items() if is_there]
