"""Text from third-party files: decoded, cleaned, and refused where it is damaged."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from dehvf_ds.data.shards import BINARY_FILES, foreign_kind

# Zero-width no-break space; at the beginning of a file it is the byte order mark.
_BYTE_ORDER_MARK = "\ufeff"
_DAMAGE = re.compile("[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")
_BLANK = re.compile("[\\s\x1c-\x1f\u200b-\u200d\u2060\ufeff]*")
# How a list, a mapping or bytes begin where a program wrote them as text.
_VALUE = re.compile("\\s*(?:[\\[({]|b['\"])")
_NULLS = frozenset(("nan", "none", "null", "<na>", "n/a", "#n/a"))


def decode_text(data: bytes, *, command: str = "") -> str:
    """Decodes UTF-8, with or without a byte order mark; ``command`` is the file's name in a shell.

    A ``ValueError`` says where it is not UTF-8, which encoding it may have and how to convert it.
    """
    if kind := foreign_kind(data, BINARY_FILES):
        raise ValueError(f"not a text in UTF-8: it is {kind}")
    head = data[:64]
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * head.count(0) > len(head)
    encoding = "UTF-16" if is_utf_16 else "WINDOWS-1252"
    remedy = f"; convert it: iconv -f {encoding} -t UTF-8 {command} > NEW" if command else "; convert it"
    if is_utf_16:
        raise ValueError(f"not UTF-8 at byte {max(0, data.find(0))}: it looks like UTF-16{remedy}")
    try:
        return data.decode().removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        at = error.start
        line = data.count(b"\n", 0, at) + 1
        raise ValueError(
            f"not UTF-8 at byte {at}, line {line} (0x{data[at]:02x}): it may be Latin-1 or "
            f"Windows-1252{remedy}"
        ) from None


def parse_json(text: str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parses JSON; a key that occurs twice in an object is a ``ValueError``: the last would win silently.

    ``parse_constant`` is called with ``NaN`` and ``Infinity``, as ``json.loads`` does.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=parse_constant)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!a} occurs twice in one object; keep one")
    return found


def clean_text(text: str) -> str:
    """A text without byte order marks.

    Control characters and half surrogate pairs, of texts cut or decoded wrongly, are a ``ValueError``.
    """
    if found := _DAMAGE.search(text):
        around = text[max(0, found.start() - 24) : found.start() + 24]
        what = "half an emoji (a lone surrogate)" if found[0] >= "\ud800" else "a control character"
        raise ValueError(f"holds {what}, U+{ord(found[0]):04X}, in {around!a}")
    return text.replace(_BYTE_ORDER_MARK, "")


def is_text(value: Any) -> bool:
    """Whether a value is a text with something visible in it."""
    return isinstance(value, str) and not _BLANK.fullmatch(value)


def is_caption(value: Any) -> bool:
    """Whether a value is a text with words other than what tables write for a missing one."""
    return is_text(value) and not is_null(value)


def is_value(text: str) -> bool:
    """Whether a text is a Python or JSON value written out: ``['A dog.', 'A cat.']``, ``b'A dog.'``."""
    if not _VALUE.match(text):
        return False
    # JSON also has true, false and null.
    for read in (ast.literal_eval, json.loads):
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError),
        ):
            return isinstance(read(text.strip()), list | tuple | set | dict | bytes)
    return False


def is_null(text: str) -> bool:
    """Whether a text is what tables write for a missing value: ``nan``, ``None``, ``null``, ..."""
    return text.strip().lower() in _NULLS
