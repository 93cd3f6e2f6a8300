"""Samples that cannot be used: why, in one line and in a word that they are counted by."""

from __future__ import annotations

from collections.abc import Mapping

from dehvf_ds.config import UserError

NO_PICTURE = "without a picture"
SEVERAL_PICTURES = "with several pictures"
UNDECODABLE = "undecodable"
NO_CAPTION = "without a caption"
BAD_TEXT = "of damaged text"
BAD_RECORD = "with an unreadable record"
BAD_PROBLEM = "with an unusable problem"
BAD_CHAT = "with an unusable conversation"
BAD_NAME = "with an unusable name"
KEY_TWICE = "of a key used before"

LFS_POINTER = b"version https://git-lfs"
"""How the text begins that git leaves in the place of a large file that was not fetched."""


class DamagedSample(UserError):
    """A sample that cannot be used; ``data.on_bad`` and ``--skip-bad`` say what becomes of it.

    Attributes:
        reason: one of the words above.
    """

    def __init__(self, message: str, reason: str = BAD_RECORD):
        """Keeps the line and the reason."""
        super().__init__(message)
        self.reason = reason


def counted(counts: Mapping[str, int]) -> str:
    """``12: 7 without a picture, 5 undecodable``, the most frequent first."""
    parts = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(counts.values())}: {', '.join(f'{count} {reason}' for reason, count in parts)}"


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())


def told_by_first_bytes(data: bytes, kinds: Mapping[bytes, str]) -> str | None:
    """What a file of another kind than its name says is, by how it begins; None if no kind begins so."""
    return next((told for start, told in kinds.items() if data.startswith(start)), None)
