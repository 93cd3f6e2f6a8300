"""Text of other people's files: decoded, cleaned, and refused where it is damaged."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from dehvf_ds.data.shards import LFS_POINTER, told_by_first_bytes

# Zero-width no-break space; at a text's beginning it is the byte order mark of a file that was read as text.
_BYTE_ORDER_MARK = "\ufeff"
_DAMAGE = re.compile("[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")
_BLANK = re.compile("[\\s\x1c-\x1f\u200b-\u200d\u2060\ufeff]*")
# How a list, a mapping or bytes begin where a program wrote them as text.
_VALUE = re.compile("\\s*(?:[\\[({]|b['\"])")
_NULLS = frozenset(("nan", "none", "null", "<na>", "n/a", "#n/a"))
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Files of other kinds under a text's name: what they begin with.
_NO_TEXTS = {
    b"PK\x03\x04": "a zip archive, or a spreadsheet (.xlsx); save it as text",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls); save it as csv in UTF-8",
    LFS_POINTER: "a Git LFS pointer; fetch the file itself: git lfs pull",
    b"PAR1": "a parquet table; save it as text",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"BZh": "packed by bzip2; unpack it",
}
_SHOWN = 24


def decode_text(data: bytes, *, command: str = "") -> str:
    """Decodes UTF-8, with or without a byte order mark; ``command`` is what a shell calls the file.

    A ``ValueError`` says where it is of another encoding, which it may be and how to convert it.
    """
    if kind := told_by_first_bytes(data, _NO_TEXTS):
        raise ValueError(f"not a text in UTF-8: it is {kind}")
    head = data[:64]
    encoding = "UTF-16" if data.startswith(_UTF_16) or 3 * head.count(0) > len(head) else "WINDOWS-1252"
    remedy = f"; convert it: iconv -f {encoding} -t UTF-8 {command} > NEW" if command else "; convert it"
    if encoding == "UTF-16":
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

    Control characters and half a surrogate pair are a ``ValueError``: texts have them that were cut or
    decoded wrongly, and nothing sensible can be learnt of those.
    """
    if found := _DAMAGE.search(text):
        around = text[max(0, found.start() - _SHOWN) : found.start() + _SHOWN]
        what = "half an emoji (a lone surrogate)" if found[0] >= "\ud800" else "a control character"
        raise ValueError(f"holds {what}, U+{ord(found[0]):04X}, in {around!a}")
    return text.replace(_BYTE_ORDER_MARK, "")


def is_text(value: Any) -> bool:
    """Whether a value is a text that shows something: not only white space and characters without width."""
    return isinstance(value, str) and not _BLANK.fullmatch(value)


def is_caption(value: Any) -> bool:
    """Whether a caption says something: a text with words that are not what tables write for none."""
    return is_text(value) and not is_null(value)


def is_value(text: str) -> bool:
    """Whether a text is a value of a program written out: ``['A dog.', 'A cat.']``, ``b'A dog.'``, ``{}``."""
    if not _VALUE.match(text):
        return False
    # JSON has true, false and null, too.
    for read in (ast.literal_eval, json.loads):
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError),
        ):
            return isinstance(read(text.strip()), list | tuple | set | dict | bytes)
    return False


def is_null(text: str) -> bool:
    """Whether a text is what tables write where there is none: ``nan``, ``None``, ``null``, ..."""
    return text.strip().lower() in _NULLS
