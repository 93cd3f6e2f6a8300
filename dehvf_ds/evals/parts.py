"""What an evaluation has answered so far: a file a rank, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError

PARTS = ".answers-{}"
TERMS_NAME = "terms.json"


def digest_of(terms: Mapping[str, Any]) -> str:
    """A hash of JSON values, the same for equal ones."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()[:16]


class AnswerParts:
    """The answers of an evaluation that is not finished, by row.

    Every rank appends to a file of its own. The directory's name is a digest of all that an answer depends
    on, so that answers of other settings, another model or other data are never taken up.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], rank: int):
        """Opens or creates the directory.

        Args:
            output: directory of the evaluation.
            identity: settings and hashes that an answer depends on.
            rank: this rank.

        Raises:
            UserError: it cannot be written.
        """
        self.directory = output / PARTS.format(digest_of(identity))
        self._path = self.directory / f"rank-{rank:05d}.jsonl"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: {error.strerror or error}") from None

    def read(self) -> dict[int, Any]:
        """All ranks' answers by row; the torn last line of a killed rank is passed over."""
        answers: dict[int, Any] = {}
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row, answer = json.loads(line)
                except (ValueError, TypeError):
                    continue
                answers[row] = answer
        return answers

    def add(self, rows: Sequence[int], answers: Sequence[Any]) -> None:
        """Appends this rank's answers to some rows.

        Raises:
            UserError: the disk is full or the directory has gone.
        """
        lines = [json.dumps([row, answer]) + "\n" for row, answer in zip(rows, answers, strict=True)]
        try:
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + "".join(lines))
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror or error}") from None

    def remove(self) -> None:
        """Removes the files, once the answers are written in one."""
        shutil.rmtree(self.directory, ignore_errors=True)
