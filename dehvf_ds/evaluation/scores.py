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
from dehvf_ds.evals import scienceqa
from dehvf_ds.evals.coco import score_captions, unique_predictions
from dehvf_ds.evaluation.questions import Reading, Record
from dehvf_ds.insight.pictures import contact_sheet

NUM_EXAMPLES = 8


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


def score_caption_rows(
    records: Sequence[Record],
    captions: Sequence[str],
    *,
    tokenizer: Literal["ptb", "simple"] = "ptb",
    references: Mapping[str, list[str]] | None = None,
) -> Scored:
    """Scores one caption a row.

    Args:
        records: keys and records.
        captions: in the same order.
        tokenizer: of the scores.
        references: captions by key, of an annotation file; None takes the records' own.

    Raises:
        UserError: a key stands twice, a row has no reference, or no metric could be computed.
    """
    keys = [key for key, _ in records]
    predictions = unique_predictions(zip(keys, captions, strict=True))
    if references is None:
        references = {key: record["captions"] for key, record in records}
    else:
        references = only_asked(references, keys)
    found = score_captions(references, predictions, tokenizer=tokenizer)
    summary = ["  ".join(f"{name} {value:.1f}" for name, value in found.corpus.items())]
    summary += [f"without {name}: {reason}" for name, reason in found.missing.items()]
    if not found.comparable:
        summary.append("tokenizer simple: not comparable with published numbers")
    return Scored(
        metrics={name: round(value, 4) for name, value in found.corpus.items()}
        | {
            "missing": found.missing,
            "comparable": found.comparable,
            "num_empty": found.num_empty,
            "tokenizer": tokenizer,
        },
        numbers=found.corpus,
        lines=[
            {"key": key, "prediction": text, "references": references[key], "scores": found.each[key]}
            for key, text in zip(keys, captions, strict=True)
        ],
        summary=summary,
    )


def only_asked(references: Mapping[str, list[str]], keys: Sequence[str]) -> dict[str, list[str]]:
    """The references of the rows that are asked: an annotation file may hold more pictures.

    Raises:
        UserError: it lacks some of them.
    """
    lacking = [key for key in keys if key not in references]
    if lacking:
        raise UserError(
            f"the references lack {len(lacking)} of {len(keys)} evaluated pictures, {lacking[0]} the first; "
            "are they of another split?"
        )
    return {key: references[key] for key in keys}


def score_answer_rows(
    records: Sequence[Record], answers: Sequence[Any], *, reading: Reading = "generation", name: str
) -> Scored:
    """Scores one answer a problem.

    Args:
        records: keys and records.
        answers: in the same order: texts, or numbers of options where ``reading`` is ``likelihood``.
        reading: how the letter is found.
        name: of the table's row.

    Raises:
        UserError: a problem stands twice.
    """
    problems = [scienceqa.problem_of(r, key, has_image=bool(r.get("image"))) for key, r in records]
    keys = [key for key, _ in records]
    if reading == "likelihood":
        choices = dict(zip(keys, answers, strict=True))
    else:
        choices = scienceqa.read_answers(problems, zip(keys, answers, strict=True))
    found = scienceqa.score(problems, choices)
    columns = found.columns
    markdown = scienceqa.markdown_row(name, found)
    average = columns[scienceqa.COLUMNS[-1]].percent
    return Scored(
        metrics={
            "accuracy": {n: None if c.percent is None else round(c.percent, 4) for n, c in columns.items()},
            "num_problems": {n: c.num_problems for n, c in columns.items()},
            "parse_failure_rate": round(found.parse_failure_percent, 4),
            "num_parse_failures": len(found.parse_failures),
            "num_image_missing": sum(bool(record.get("image_missing")) for _, record in records),
            "confusion": found.confusion,
            "markdown": markdown,
            "latex": scienceqa.latex_row(name, found),
        },
        numbers={"accuracy": average or 0.0, "parse_failure_rate": found.parse_failure_percent},
        lines=[
            {"key": p.id, "prediction": answer, "choice": choices[p.id], "answer": p.answer}
            for p, answer in zip(problems, answers, strict=True)
        ],
        summary=[
            f"{scienceqa.markdown_header()}\n{markdown}",
            f"parse failures: {len(found.parse_failures)} of {len(problems)}",
        ],
    )


def draw_examples(index: ShardIndex, scored: Scored, path: Path) -> None:
    """Draws some rows, evenly spread: picture, what the model says, and below it a reference."""
    shown = _spread(len(scored.lines), NUM_EXAMPLES)
    lines = [scored.lines[i] for i in shown]
    contact_sheet(
        [read_sample(index, i).image or Image.new("RGB", (1, 1), "white") for i in shown],
        [str(line["prediction"]) for line in lines],
        path,
        references=[_truth(line) for line in lines],
    )


def _truth(line: Mapping[str, Any]) -> str:
    return line["references"][0] if "references" in line else ascii_uppercase[line["answer"]]


def _spread(total: int, count: int) -> list[int]:
    """``count`` of the indices below ``total``, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]
