"""A sample's record: read, cleaned and checked, the same when shards are made, adopted, verified and read.

A caption row always has a picture. A row of another task is text only where two signs agree: the shard holds
no picture, and the record speaks of none (or says ``image_missing``). So no row is trained blind. Problems of
ScienceQA are checked for what training and scoring need of them.
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
    clean_text,
    decode_text,
    is_caption,
    is_null,
    is_text,
    is_value,
    one_line,
    parse_json,
    picture_name,
)

PICTURE_FIELD = re.compile(
    r"(?:image|img|picture|pic|photo|video|frame|media)s?"
    r"[_ -]?(?:path|file|file[_ -]?name|name|url|uri|src|id|bytes|data|base64|b64)?s?"
    r"|file[_ -]?(?:name|path)s?",
    re.IGNORECASE,
)
"""Fields by which a record speaks of a picture or video that belongs to it."""

# Notes: what is odd in a usable row, or was put right in it.
EMPTY_CAPTION = "empty caption beside others left out"
UNASKED_TURN = "turn of the assistant before a question dropped"
SEVERAL_MARKS = "chat with several <image> for its one picture"
SAME_CHOICE = "problem whose right choice stands twice among its choices"
NULL_ANSWER = "answer that is the word nan or null"
MARKED_ANSWER = "answer with a mark such as <image> in it, learnt as text"
SEVERAL_LINES = "caption of several lines in a .txt, read as one caption"
OTHER_CAPTION = "caption in a .txt that differs from its .json's, which is not read"
UNREAD_TEXT = ".txt beside a record that has its own texts, not read"
LOST_CHARACTER = "text with U+FFFD or U+0080 to U+009F in it, a character that was lost before"

_HALF_EMOJI = re.compile("[\ud800-\udfff]")
# What stands for bytes that nobody could read, and Windows-1252 that was read as Latin-1.
_LOST = re.compile("[\ufffd\x80-\x9f]")
_TASK_FIELDS = ("captions", "conversations", "question")
_PROBLEM_FIELDS = ("question", "choices", "answer", "subject", "grade", "hint")
_PROBLEM_TEXTS = ("question", "hint", "lecture", "solution", "image_caption")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADE = re.compile(r"grade([1-9]|1[0-2])")


class CheckedRecord(NamedTuple):
    """A record that can be trained on, cleaned.

    A caption row's captions are in ``captions``, and a conversation's turns, parsed, in ``messages``.
    """

    record: dict[str, Any]
    task: Task
    notes: tuple[str, ...] = ()
    messages: Messages = ()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What scoring needs to know of a problem of ScienceQA; ``id`` is the sample's key."""

    id: str
    answer: int
    """Number of the right choice, from 0."""
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


def parse_record(members: Mapping[str, Any]) -> dict[str, Any]:
    """The checked record of a sample; see ``read_record``."""
    return read_record(members).record


def read_record(members: Mapping[str, Any]) -> CheckedRecord:
    """Reads and checks the record of a sample, given as ``parse_members`` does.

    A caption that lies in a ``.txt``, or alone in ``caption``, becomes ``captions``. A ``DamagedSample`` says
    why the sample cannot be used.
    """
    where = str(members.get("__url__", "sample"))
    picture, notes = picture_name(members), ()
    try:
        record = parse_json(decode_text(members["json"])) if "json" in members else {}
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if "txt" in members and any(field in record for field in _TASK_FIELDS):
            notes = (UNREAD_TEXT,)
        elif "txt" in members:
            text = decode_text(members["txt"])
            notes = _notes_on_text(text, record.get("caption"))
            record["captions"] = [text]
    except (ValueError, RecursionError) as error:
        reason = BAD_TEXT if "UTF-8" in str(error) else BAD_RECORD
        raise DamagedSample(f"{where}: its text is not usable: {one_line(error)}", reason) from error
    if picture is not None and not members[picture]:
        raise DamagedSample(f"{where}: a picture of 0 bytes", UNDECODABLE)
    if picture is None:
        for name in members:
            if not name.startswith("__") and name.rpartition(".")[2] not in NO_PICTURES:
                what = f"{where}: .{name} is no kind of picture that is read; convert it"
                raise DamagedSample(what, NO_PICTURE)
    checked = check_record(record, has_picture=picture is not None, where=where)
    return checked._replace(notes=(*notes, *checked.notes))


def check_record(record: dict[str, Any], *, has_picture: bool, where: str = "") -> CheckedRecord:
    """Cleans a record in place; a ``DamagedSample``, of ``where``, could not be trained on or scored."""
    try:
        return _check(record, has_picture)
    except DamagedSample as error:
        raise DamagedSample(f"{where}: {error}" if where else str(error), error.reason) from None


def text_lengths(record: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Number of captions, and the characters of each example's text without its prompt (for bucketing)."""
    if captions := record.get("captions"):
        return len(captions), tuple(len(caption) for caption in captions)
    if turns := record.get("conversations"):
        return 0, (sum(len(turn["value"]) for turn in turns),)
    texts = [record.get("question"), record.get("hint"), *record.get("choices", ())]
    return 0, (sum(len(text) for text in texts if isinstance(text, str)),)


def pictures_named(record: Mapping[str, Any]) -> list[str]:
    """The file that a record's ``image`` or ``images`` names, if any; several are a ``DamagedSample``."""
    names: list[str] = []
    for field in ("image", "images"):
        value = record.get(field)
        for name in value if isinstance(value, list | tuple) else [value]:
            if name is None or name == "":
                continue
            if not isinstance(name, str):
                raise DamagedSample(f"the picture's name {name!r} is not a text", NO_PICTURE)
            if name not in names:
                names.append(name)
    if len(names) > 1:
        raise DamagedSample(f"{len(names)} pictures; one picture a row is supported", SEVERAL_PICTURES)
    return names


def problem_of(record: Mapping[str, Any], key: str, has_image: bool) -> Problem:
    """The facts of a problem's record; a ``UserError`` is what training or scoring would stumble over.

    In the papers' columns ``has_image`` is whether the record names one, also where the shard lacks it
    (``image_missing``).
    """
    if missing := [name for name in _PROBLEM_FIELDS if name not in record]:
        raise UserError(f"{key}: not a problem of ScienceQA: lacks {', '.join(missing)}")
    question, choices, answer, subject, grade, hint = (record[name] for name in _PROBLEM_FIELDS)
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise UserError(f"{key}: choices is not a list of 2 to {len(ascii_uppercase)} texts")
    for name, text in (("question", question), *(("a choice", choice) for choice in choices)):
        if not is_text(text):
            shown = repr(text) if isinstance(text, str) else type(text).__name__
            raise UserError(f"{key}: {name} is {shown}, not a text")
    # True is an int, and a letter is no number.
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{key}: answer {answer!r} is no number of its {len(choices)} choices, from 0")
    if not isinstance(subject, str) or subject not in _SUBJECTS:
        raise UserError(f"{key}: subject {subject!r} is none of {', '.join(_SUBJECTS)}")
    if not isinstance(grade, str) or not (parsed := _GRADE.fullmatch(grade)):
        raise UserError(f"{key}: grade {grade!r} is none of grade1 .. grade12")
    for name in _PROBLEM_TEXTS[1:]:
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


def _check(record: dict[str, Any], has_picture: bool) -> CheckedRecord:
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
        # Half an emoji in any other field would end what writes it.
        if _HALF_EMOJI.search(written := json.dumps(record, ensure_ascii=False)):
            raise ValueError("holds half an emoji (a lone surrogate)")
        if _LOST.search(written):
            notes.append(LOST_CHARACTER)
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
            # Scores tell problems with a picture from others by this field.
            record["image"] = "image"
        try:
            problem = problem_of(record, "its record", has_picture)
        except UserError as error:
            raise DamagedSample(str(error), BAD_PROBLEM) from None
        if record["choices"].count(record["choices"][problem.answer]) > 1:
            notes.append(SAME_CHOICE)
    return CheckedRecord(record, task, tuple(notes), messages)


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
        what = f"has an empty caption, or one that is no text ({type(wrong[0]).__name__} {wrong[0]!r:.40})"
        raise DamagedSample(what, NO_CAPTION)
    kept = [caption for caption in captions if is_caption(caption)]
    if captions and not kept:
        raise DamagedSample(f"has an empty caption alone ({captions[0]!r:.40})", NO_CAPTION)
    if values := [caption for caption in kept if is_value(caption)]:
        what = f"its caption is a list or another value written as text ({values[0]!r:.40})"
        raise DamagedSample(f"{what}; write each caption as a plain text of its own", BAD_TEXT)
    try:
        record["captions"] = [clean_text(caption) for caption in kept]
    except ValueError as error:
        raise DamagedSample(f"its caption {one_line(error)}; correct it", BAD_TEXT) from None
    return [EMPTY_CAPTION] * (len(captions) - len(kept))


def _require_no_picture(record: dict[str, Any], task: Task) -> None:
    """Refuses a row without a picture that is not text only by intent."""
    status, failed = record.get("status"), ""
    if status not in (None, "success"):
        failed = f" (its download: {status}, {record.get('error_message')})"
    if task == "caption":
        endings = ".jpg, .png, .webp, .gif, .bmp, .tif, .avif, .jp2, .."
        raise DamagedSample(
            f"a caption without a picture{failed}; its name ends in one of {endings}", NO_PICTURE
        )
    if record.get("image_missing") is True:
        return
    if str(status).startswith("failed_to"):
        raise DamagedSample(f"its picture is missing{failed}", NO_PICTURE)
    for field, value in record.items():
        if PICTURE_FIELD.fullmatch(str(field)) and value not in (None, "", [], {}):
            named = f"its record names a picture ({field}: {value!r:.60})"
            raise DamagedSample(f"{named}, but the sample holds none{failed}", NO_PICTURE)
    asked = [text for field in ("question", "hint") if isinstance(text := record.get(field), str)]
    for text in (*_texts_of(record, ("human", "user", "system")), *asked):
        if mark := PLACEHOLDER.search(text):
            what = f"its text speaks of a picture ({mark[0].strip()}), but the sample holds none{failed}"
            raise DamagedSample(what, NO_PICTURE)


def _texts_of(record: dict[str, Any], speakers: tuple[str, ...]) -> list[str]:
    """What some speakers say, of a conversation that may be anything yet."""
    turns = record.get("conversations")
    return [
        turn["value"]
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if str(turn.get("from")).strip().lower() in speakers
    ]


def _notes_on_text(text: str, caption: Any) -> tuple[str, ...]:
    """What the user may not expect of a caption in a ``.txt``, beside a record with a ``caption`` or none."""
    notes = []
    if sum(bool(line.strip()) for line in text.splitlines()) > 1:
        notes.append(SEVERAL_LINES)
    if isinstance(caption, str) and caption.split() != text.split():
        notes.append(OTHER_CAPTION)
    return tuple(notes)


def _check_chat(record: dict[str, Any], has_picture: bool) -> tuple[Messages, list[str]]:
    turns = record["conversations"]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            turn["value"] = clean_text(turn["value"])
    try:
        messages = parse_conversation(record)
    except UserError as error:
        raise DamagedSample(str(error), BAD_CHAT) from None
    marks = sum(len(PLACEHOLDER.findall(text)) for text in _texts_of(record, ("human", "user")))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = {
        UNASKED_TURN: len(messages) < len(turns),
        SEVERAL_MARKS: has_picture and marks > 1,
        NULL_ANSWER: any(map(is_null, answers)),
        MARKED_ANSWER: any(map(PLACEHOLDER.search, answers)),
    }
    return messages, [note for note, is_there in found.items() if is_there]
