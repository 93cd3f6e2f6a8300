"""From answers to numbers, to one line an answer, and to example pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import read_sample
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.evals import scienceqa
from dehvf_ds.evals.coco import CAPTION_METRICS, References, unique_predictions
from dehvf_ds.evals.coco_files import is_karpathy, load_references, match_references
from dehvf_ds.evaluation.contact_sheet import contact_sheet
from dehvf_ds.evaluation.questions import UNREADABLE, Questions, Reading, Record

NUM_EXAMPLES = 8
MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An evaluation's result.

    Attributes:
        metrics: for ``metrics.json``.
        numbers: of these what a curve is drawn of, x100: each caption metric, or ``accuracy``.
        lines: of ``predictions.jsonl``, in the rows' order.
        summary: for the console.
    """

    metrics: dict[str, Any]
    numbers: dict[str, float]
    lines: list[dict[str, Any]]
    summary: list[str]


class CaptionScorer:
    """Scores one caption a row; what can be wrong with the references is found when it is made."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        tokenizer: Literal["ptb", "simple"] = "ptb",
        references: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Takes the references of the rows that are asked, and of no others.

        Args:
            records: keys and records.
            tokenizer: of the scores.
            references: captions by file name, of an annotation file; None takes the records' own.

        Raises:
            UserError: a key stands twice, a row has no reference, or the references cannot be tokenized.
        """
        self._keys = [key for key, _ in records]
        unique_predictions((key, "") for key in self._keys)
        if references is None:
            self._captions = {key: list(record.get("captions") or ()) for key, record in records}
        else:
            # Shards of other tools have no file names; their keys are made of them.
            names = {key: str(record.get("file_name") or key) for key, record in records}
            self._captions = match_references(references, names)
        self._tokenizer = tokenizer
        self._truth = References(self._captions, tokenizer=tokenizer)

    def lines(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Of ``predictions.jsonl``, without scores."""
        lines = [
            {"key": key, "prediction": _text(answer), "references": self._captions[key]}
            for key, answer in zip(self._keys, answers, strict=True)
        ]
        return _with_reasons(lines, answers)

    def score(self, answers: Sequence[Any]) -> Scored:
        """Scores one answer a row, in the records' order; an unreadable picture's is empty.

        Raises:
            UserError: no metric could be computed.
        """
        texts = dict(zip(self._keys, map(_text, answers), strict=True))
        unreadable = _unreadable(self._keys, answers)
        found = self._truth.score(texts)
        summary = ["  ".join(f"{name} {value:.1f}" for name, value in found.corpus.items())]
        summary += [f"without {name}: {reason}" for name, reason in found.missing.items()]
        if not found.comparable:
            summary.append("tokenizer simple: not comparable with published numbers")
        metrics: dict[str, Any] = {
            name: None if name in found.missing else round(found.corpus[name], 4)
            for name in CAPTION_METRICS
            if name in found.missing or name in found.corpus
        }
        metrics |= {
            "missing": found.missing,
            "comparable": found.comparable,
            "num_empty": found.num_empty,
            "num_wordless_references": self._truth.num_wordless,
            "tokenizer": self._tokenizer,
        }
        return Scored(
            metrics=metrics | _counted(unreadable),
            numbers=found.corpus | _number(unreadable),
            lines=[line | {"scores": found.each[line["key"]]} for line in self.lines(answers)],
            summary=summary + _told(unreadable, len(answers)),
        )


class AnswerScorer:
    """Scores one answer a problem; a record that is no problem is found when it is made."""

    def __init__(self, records: Sequence[Record], *, reading: Reading = "generation", name: str) -> None:
        """Looks at every problem.

        Args:
            records: keys and records.
            reading: how the letter is found.
            name: of the table's row.

        Raises:
            UserError: a record is no problem of ScienceQA, or a key stands twice.
        """
        # For the papers' columns a picture is one that the record names, also where the shard lacks it.
        self._problems = [scienceqa.problem_of(r, key, has_image=bool(r.get("image"))) for key, r in records]
        unique_predictions((key, "") for key, _ in records)
        self._num_missing = sum(bool(record.get("image_missing")) for _, record in records)
        self._reading = reading
        self._name = name

    def lines(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Of ``predictions.jsonl``, with the choice that is read from each answer."""
        choices = self._choices(answers)
        lines = [
            {"key": p.id, "prediction": _plain(answer), "choice": choices[p.id], "answer": p.answer}
            for p, answer in zip(self._problems, answers, strict=True)
        ]
        return _with_reasons(lines, answers)

    def score(self, answers: Sequence[Any]) -> Scored:
        """Scores one answer a problem, in the records' order; an unreadable picture's names no choice."""
        found = scienceqa.score(self._problems, self._choices(answers))
        unreadable = _unreadable([p.id for p in self._problems], answers)
        columns = found.columns
        markdown = scienceqa.markdown_row(self._name, found)
        average = columns[scienceqa.COLUMNS[-1]].percent
        assert average is not None
        return Scored(
            metrics={
                "accuracy": {
                    n: None if c.percent is None else round(c.percent, 4) for n, c in columns.items()
                },
                "num_problems": {n: c.num_problems for n, c in columns.items()},
                "parse_failure_rate": round(found.parse_failure_percent, 4),
                "num_parse_failures": len(found.parse_failures),
                "num_image_missing": self._num_missing,
                "confusion": found.confusion,
                "markdown": markdown,
                "latex": scienceqa.latex_row(self._name, found),
            }
            | _counted(unreadable),
            numbers={"accuracy": average, "parse_failure_rate": found.parse_failure_percent}
            | _number(unreadable),
            lines=self.lines(answers),
            summary=[
                f"{scienceqa.markdown_header()}\n{markdown}",
                f"parse failures: {len(found.parse_failures)} of {len(self._problems)}",
                *_told(unreadable, len(answers)),
            ],
        )

    def _choices(self, answers: Sequence[Any]) -> dict[str, int | None]:
        keys = [problem.id for problem in self._problems]
        if self._reading == "likelihood":
            return dict(zip(keys, map(_plain, answers), strict=True))
        return scienceqa.read_answers(self._problems, zip(keys, map(_text, answers), strict=True))


def open_scorer(
    questions: Questions,
    *,
    name: str,
    tokenizer: Literal["ptb", "simple"] = "ptb",
    references: str | None = None,
    split: str | None = None,
) -> CaptionScorer | AnswerScorer:
    """Reads the records of all rows that are asked, and finds before decoding what would keep them unscored.

    Args:
        questions: what is asked.
        name: of the row in ScienceQA's table.
        tokenizer: of caption scores.
        references: file of captions to score against; None takes the records' own.
        split: part of it, where it has several.

    Raises:
        UserError: a record cannot be scored, or the references are not those of the rows.
    """
    records = questions.records()
    if questions.task == "scienceqa":
        return AnswerScorer(records, reading="likelihood" if questions.letters else "generation", name=name)
    found = None
    if references is not None:
        path = Path(references)
        # COCO's own files hold one split, and name none.
        found = load_references(path, split if is_karpathy(path) else None)
    return CaptionScorer(records, tokenizer=tokenizer, references=found)


def draw_examples(index: ShardIndex, scored: Scored, path: Path) -> None:
    """Draws some rows, evenly spread: picture, what the model says, and below it a reference."""
    shown = _spread(len(scored.lines), NUM_EXAMPLES)
    lines = [scored.lines[i] for i in shown]
    contact_sheet(
        [_picture(index, i) for i in shown],
        [_said(line) for line in lines],
        path,
        references=[_truth(line) for line in lines],
    )


def _said(line: Mapping[str, Any]) -> str:
    if UNREADABLE in line:
        return "(picture not readable)"
    answer = line["prediction"]
    return ascii_uppercase[answer] if isinstance(answer, int) else str(answer)


def _picture(index: ShardIndex, row: int) -> Image.Image:
    try:
        image = read_sample(index, row).image
    except DamagedSample:
        image = None
    return image or Image.new("RGB", (1, 1), "white")


def _unreadable(keys: Sequence[str], answers: Sequence[Any]) -> dict[str, str]:
    """Why a picture could not be read, by its row's key.

    Raises:
        UserError: none could be read, so that nothing was evaluated.
    """
    pairs = zip(keys, answers, strict=True)
    found = {key: answer[UNREADABLE] for key, answer in pairs if isinstance(answer, dict)}
    if len(found) == len(keys):
        raise UserError(f"none of the {len(keys)} rows could be read: {next(iter(found.values()))}")
    return found


def _counted(unreadable: Mapping[str, str]) -> dict[str, Any]:
    return {"num_unreadable": len(unreadable), "unreadable": dict(unreadable)}


def _number(unreadable: Mapping[str, str]) -> dict[str, float]:
    return {"num_unreadable": float(len(unreadable))} if unreadable else {}


def _told(unreadable: Mapping[str, str], num_rows: int) -> list[str]:
    if not unreadable:
        return []
    named = [*list(unreadable)[:MAX_NAMED], *(["..."] if len(unreadable) > MAX_NAMED else [])]
    return [
        f"warning: {len(unreadable)} of {num_rows} pictures could not be read and count as empty answers: "
        f"{', '.join(named)} ({next(iter(unreadable.values()))})"
    ]


def _with_reasons(lines: list[dict[str, Any]], answers: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        line | (answer if isinstance(answer, dict) else {})
        for line, answer in zip(lines, answers, strict=True)
    ]


def _plain(answer: Any) -> Any:
    """An answer; None where the picture could not be read."""
    return None if isinstance(answer, dict) else answer


def _text(answer: Any) -> str:
    return "" if isinstance(answer, dict) or answer is None else str(answer)


def _truth(line: Mapping[str, Any]) -> str:
    return line["references"][0] if "references" in line else ascii_uppercase[line["answer"]]


def _spread(total: int, count: int) -> list[int]:
    """``count`` of the indices below ``total``, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
