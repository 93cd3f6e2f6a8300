"""A sample's record: read, cleaned and checked, the same when shards are made, adopted, verified and read.

A caption row always has a picture. A row of another task is text only where two signs agree: the shard holds
no picture, and the record speaks of none (or says ``image_missing``). So no row is trained blind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dehvf_ds.config import UserError
from dehvf_ds.data.chat import PLACEHOLDER, Messages, parse_conversation
from dehvf_ds.data.damage import (
    BAD_CHAT,
    BAD_PROBLEM,
    BAD_RECORD,
    BAD_TEXT,
    NO_CAPTION,
    NO_PICTURE,
    SEVERAL_PICTURES,
    UNDECODABLE,
    DamagedSample,
    one_line,
)
from dehvf_ds.data.members import NO_PICTURES, picture_name
from dehvf_ds.data.problems import problem_of
from dehvf_ds.data.prompts import Task
from dehvf_ds.data.text import clean_text, decode_text, is_caption, is_null, is_value, parse_json

PICTURE_FIELD = re.compile(
    r"(?:image|img|picture|pic|photo|video|frame|media)s?"
    r"[_ -]?(?:path|file|file[_ -]?name|name|url|uri|src|id|bytes|data|base64|b64)?s?"
    r"|file[_ -]?(?:name|path)s?",
    re.IGNORECASE,
)
"""Fields by which a record speaks of a picture or video that belongs to it."""

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

TASK_FIELDS = ("captions", "conversations", "question")
_COMMON_ENDINGS = ".jpg, .png, .webp, .gif, .bmp, .tif, .avif, .jp2, .."
# What stands for bytes that nobody could read, and Windows-1252 that was read as Latin-1.
_LOST = re.compile("[\ufffd\x80-\x9f]")
_PROBLEM_TEXTS = ("question", "hint", "lecture", "solution", "image_caption")


class CheckedRecord(NamedTuple):
    """A record that can be trained on.

    Attributes:
        record: cleaned; the captions of a caption row stand in ``captions``.
        task: what it is for.
        notes: what was put right in it, a word each.
        messages: a conversation's turns, parsed.
    """

    record: dict[str, Any]
    task: Task
    notes: tuple[str, ...] = ()
    messages: Messages = ()


def parse_record(members: Mapping[str, Any]) -> dict[str, Any]:
    """The checked record of a sample; see ``read_record``."""
    return read_record(members).record


def read_record(members: Mapping[str, Any]) -> CheckedRecord:
    """Reads and checks a sample's record.

    A caption that lies in a ``.txt``, or alone in ``caption``, becomes ``captions``.

    Args:
        members: as ``parse_members`` gives them.

    Raises:
        DamagedSample: it is no JSON object in UTF-8, or ``check_record`` refuses it.
    """
    where = str(members.get("__url__", "sample"))
    picture, notes = picture_name(dict(members)), ()
    try:
        record = _parse_json(members["json"]) if "json" in members else {}
        if "txt" in members and any(field in record for field in TASK_FIELDS):
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
    own = [name for name in members if not name.startswith("__")]
    others = [name for name in own if name.rpartition(".")[2] not in NO_PICTURES]
    if picture is None and others:
        raise DamagedSample(
            f"{where}: .{others[0]} is no kind of picture that is read; convert it", NO_PICTURE
        )
    checked = check_record(record, has_picture=picture is not None, where=where)
    return checked._replace(notes=(*notes, *checked.notes))


def check_record(record: dict[str, Any], *, has_picture: bool, where: str = "") -> CheckedRecord:
    """Cleans a record in place, and refuses what could not be trained on or scored.

    Args:
        record: captions, a conversation, or a problem of ScienceQA.
        has_picture: whether the sample has a picture.
        where: file and sample, for the message.

    Raises:
        DamagedSample: why not.
    """
    try:
        return _check(record, has_picture)
    except DamagedSample as error:
        raise DamagedSample(f"{where}: {error}" if where else str(error), error.reason) from None


def task_of(record: Mapping[str, Any]) -> Task | None:
    """What a record is for; None where it has nothing to learn."""
    if record.get("captions"):
        return "caption"
    if "conversations" in record:
        return "chat"
    return "scienceqa" if "question" in record or "choices" in record else None


def text_lengths(record: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Number of captions, and the characters of each example's text without its prompt (for bucketing)."""
    if captions := record.get("captions"):
        return len(captions), tuple(len(caption) for caption in captions)
    if turns := record.get("conversations"):
        return 0, (sum(len(turn["value"]) for turn in turns),)
    choices = record.get("choices")
    texts = [record.get("question"), record.get("hint"), *(choices if isinstance(choices, list) else ())]
    return 0, (sum(len(text) for text in texts if isinstance(text, str)),)


def pictures_named(record: Mapping[str, Any]) -> list[str]:
    """The files that a record's ``image`` or ``images`` names.

    Raises:
        DamagedSample: a name is no text.
    """
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


def _check(record: dict[str, Any], has_picture: bool) -> CheckedRecord:
    notes, messages = _gather_captions(record), ()
    task = task_of(record)
    if task is None:
        fields = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise DamagedSample(
            f"has no caption, nor conversations, nor a question with choices (its record holds {fields})",
            NO_CAPTION,
        )
    if not has_picture:
        _require_no_picture(record, task)
    elif task != "caption":
        pictures_named(record)
    try:
        # Half an emoji in any other field would end what writes it.
        if _LOST.search(written := json.dumps(record, ensure_ascii=False)):
            notes.append(LOST_CHARACTER)
        written.encode()
        for field in _PROBLEM_TEXTS:
            if isinstance(text := record.get(field), str):
                record[field] = clean_text(text)
        if task == "scienceqa" and isinstance(choices := record.get("choices"), list):
            record["choices"] = [clean_text(c) if isinstance(c, str) else c for c in choices]
        if task == "chat":
            messages, odd = _check_chat(record, has_picture)
            notes += odd
    except ValueError as error:
        raise DamagedSample(f"its text {_as_clause(error)}; correct it", BAD_TEXT) from None
    if task == "scienceqa":
        if has_picture and not record.get("image"):
            # Scores tell problems with a picture from others by this field.
            record["image"] = "image"
        try:
            problem_of(record, "its record", has_picture)
        except UserError as error:
            raise DamagedSample(str(error), BAD_PROBLEM) from None
        right = record["choices"][record["answer"] :][:1]
        if right and record["choices"].count(right[0]) > 1:
            notes.append(SAME_CHOICE)
    return CheckedRecord(record, task, tuple(notes), messages)


def _gather_captions(record: dict[str, Any]) -> list[str]:
    """Puts a record's captions into ``captions``, clean and without empty ones; returns notes."""
    captions = record.get("captions")
    if "captions" not in record and "caption" in record and not any(f in record for f in TASK_FIELDS[1:]):
        captions = record["caption"]
        captions = captions if isinstance(captions, list) else [captions]
    if captions is None and "captions" not in record:
        return []
    if not isinstance(captions, list | tuple):
        raise DamagedSample(f"captions is {type(captions).__name__}, not a list of texts", NO_CAPTION)
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise DamagedSample(
            f"has an empty caption, or one that is no text ({type(wrong[0]).__name__} {wrong[0]!r:.40})",
            NO_CAPTION,
        )
    kept = [caption for caption in captions if is_caption(caption)]
    if captions and not kept:
        raise DamagedSample(f"has an empty caption alone ({captions[0]!r:.40})", NO_CAPTION)
    if values := [caption for caption in kept if is_value(caption)]:
        raise DamagedSample(
            f"its caption is a list or another value written as text ({values[0]!r:.40}); write each "
            "caption as a plain text of its own",
            BAD_TEXT,
        )
    try:
        record["captions"] = [clean_text(caption) for caption in kept]
    except ValueError as error:
        raise DamagedSample(f"its caption {_as_clause(error)}; correct it", BAD_TEXT) from None
    return [EMPTY_CAPTION] * (len(captions) - len(kept))


def _require_no_picture(record: dict[str, Any], task: Task) -> None:
    """Refuses a row without a picture that is not text only by intent."""
    status = record.get("status")
    failed = (
        f" (its download: {status}, {record.get('error_message')})" if status not in (None, "success") else ""
    )
    if task == "caption":
        raise DamagedSample(
            f"a caption without a picture{failed}; its name ends in one of {_COMMON_ENDINGS}",
            NO_PICTURE,
        )
    if record.get("image_missing") is True:
        return
    if str(status).startswith("failed_to"):
        raise DamagedSample(f"its picture is missing{failed}", NO_PICTURE)
    fields = [f for f in record if PICTURE_FIELD.fullmatch(str(f)) and record[f] not in (None, "", [], {})]
    if fields:
        raise DamagedSample(
            f"its record names a picture ({fields[0]}: {record[fields[0]]!r:.60}), but the sample holds none"
            f"{failed}",
            NO_PICTURE,
        )
    asked = [text for field in ("question", "hint") if isinstance(text := record.get(field), str)]
    for text in (*_texts_of(record, ("human", "user", "system")), *asked):
        if mark := PLACEHOLDER.search(text):
            message = f"its text speaks of a picture ({mark[0].strip()}), but the sample holds none{failed}"
            raise DamagedSample(message, NO_PICTURE)


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
    notes = [UNASKED_TURN] if len(messages) < len(turns) else []
    if (
        has_picture
        and sum(len(PLACEHOLDER.findall(text)) for text in _texts_of(record, ("human", "user"))) > 1
    ):
        notes.append(SEVERAL_MARKS)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if any(map(is_null, answers)):
        notes.append(NULL_ANSWER)
    if any(map(PLACEHOLDER.search, answers)):
        notes.append(MARKED_ANSWER)
    return messages, notes


def _parse_json(data: bytes) -> dict[str, Any]:
    record = parse_json(decode_text(data))
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _as_clause(error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"holds half an emoji (a lone surrogate), {error.object[error.start : error.end]!a}"
    return one_line(error)
