"""What an evaluation leaves behind: answers, scores, example pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.evaluation.place import METRICS_NAME, terms_of
from dehvf_ds.evaluation.scores import Scored, draw_examples

PREDICTIONS_NAME = "predictions.jsonl"

# Measured on demand; the same terms give the same value.
_LOSS_NAMES = ("loss", "loss_num_tokens", "loss_num_left_out", "loss_reason")


# JSON takes them as they are, but programs that read line by line end a line there.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: letters as they are, but where a text has half a surrogate pair.

    Without ``indent`` it is one line, whatever a reader takes for the end of one.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line; the file gets its name when it is whole.

    Raises:
        UserError: it cannot be written.
    """
    _write(path, "".join(json_text(line) + "\n" for line in lines))


def write_results(directory: Path, scored: Scored, report: Mapping[str, Any], index: ShardIndex) -> list[str]:
    """Writes scores, answers and examples; the examples fail alone.

    Args:
        directory: of the evaluation.
        scored: the result.
        report: what it was made with.
        index: where the examples' pictures are read from.

    Returns:
        What the user should read, a line each.

    Raises:
        UserError: scores or answers cannot be written.
    """
    metrics = scored.metrics | _kept_loss(directory / METRICS_NAME, report) | dict(report)
    write_lines(directory / PREDICTIONS_NAME, scored.lines)
    _write(directory / METRICS_NAME, json_text(metrics, indent=1))
    sheet = directory / "examples.png"
    reason = try_examples(index, scored, sheet)
    return [] if reason is None else [f"without {sheet.name}: {reason}"]


def try_examples(index: ShardIndex, scored: Scored, path: Path) -> str | None:
    """Draws example pictures; why not, in one line, where that fails."""
    try:
        draw_examples(index, scored, path)
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _kept_loss(path: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The loss that an earlier call with ``--loss`` measured here, where this one does not."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if "loss" not in report and terms_of(old) == terms_of(report):
            return {name: old[name] for name in _LOSS_NAMES if name in old}
    except (OSError, ValueError, AttributeError):
        pass
    return {}


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
