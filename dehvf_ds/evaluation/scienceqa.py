"""ScienceQA, QCM-A: reads the letter of an answer, and scores the nine columns of the papers.

The protocol is that of MemVP and ADEM-VL: a generation that names no choice is wrong, and counted as a parse
failure. LaVIN draws a choice at random there, and LLaVA lets the model explain first: numbers across
protocols are not comparable, nor are those with and without captions of the pictures
(``data.scienceqa.image_captions``). A caption does not put a problem into the column TXT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX
from dehvf_ds.data.records import problem_of
from dehvf_ds.evaluation.predict import Scored

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
"""The papers' columns, in their order: subject, context, grade, all."""

# After the letter a full stop that ends the word, or nothing more: "A dog" and "A.5" name no choice.
_LETTER = re.compile(rf"(?:\A\s*|(?<!\S){re.escape(SCIENCEQA_ANSWER_PREFIX)}\s+)([A-Z])(?:\.(?!\S)|\s*\Z)")
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def read_letter(text: str, num_choices: int) -> int | None:
    """The choice that a generation names, from 0; None if it names none, or two.

    A letter A to Z counts at the start of the text, since the prompt may end in ``The answer is``, or
    anywhere after these three words, if it ends the text, or a full stop follows and ends the word. `` A``,
    ``A. BECAUSE: ..`` and ``.. The answer is A.`` name A; ``Apple``, ``A dog``, ``(A)`` and ``a`` nothing.
    """
    letters = set(_LETTER.findall(text))
    if len(letters) != 1:
        return None
    choice = ascii_uppercase.index(letters.pop())
    return choice if choice < num_choices else None


class AnswerScorer:
    """Scores one answer per problem."""

    def __init__(self, records: Sequence[tuple[str, Mapping[str, Any]]], *, name: str) -> None:
        """Refuses records that are no problems; ``name`` begins the table's row."""
        # For the papers' columns a picture counts if the record names one, even if the shard lacks it.
        self._problems = [problem_of(record, key, bool(record.get("image"))) for key, record in records]
        self._num_missing = sum(bool(record.get("image_missing")) for _, record in records)
        self._name = " ".join(name.split())
        self.keys = [key for key, _ in records]

    def lines(self, predictions: Sequence[str | int | None]) -> list[dict[str, Any]]:
        """Lines of ``predictions.jsonl``, with the choice that each answer names."""
        choices = self._choices(predictions)
        return [
            {"key": p.id, "prediction": prediction, "choice": choice, "answer": p.answer}
            for p, prediction, choice in zip(self._problems, predictions, choices, strict=True)
        ]

    def score(self, predictions: Sequence[str | int | None]) -> Scored:
        """Scores one answer per problem: a text, or a choice's number; None names no choice."""
        choices = self._choices(predictions)
        right, total, confusion = Counter(), Counter(), {}
        for size in sorted({problem.num_choices for problem in self._problems}):
            # A row for each right answer, a column for each prediction, the last one for parse failures.
            confusion[size] = [[0] * (size + 1) for _ in range(size)]
        for problem, choice in zip(self._problems, choices, strict=True):
            total.update(problem.columns)
            right.update(problem.columns if choice == problem.answer else ())
            confusion[problem.num_choices][problem.answer][-1 if choice is None else choice] += 1
        accuracy = {name: 100 * right[name] / total[name] if total[name] else None for name in COLUMNS}
        failures = choices.count(None)
        failure_rate = 100 * failures / len(choices)
        escaped = self._name.replace("\\", "\\\\").replace("|", "\\|")
        markdown = f"| {' | '.join([escaped, *_cells(accuracy, '-')])} |"
        latex = rf"{' & '.join([self._name.translate(_LATEX), *_cells(accuracy, '--')])} \\"
        header = f"| Method | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}"
        return Scored(
            metrics={
                "accuracy": {name: None if v is None else round(v, 4) for name, v in accuracy.items()},
                "num_problems": {name: total[name] for name in COLUMNS},
                "parse_failure_rate": round(failure_rate, 4),
                "num_parse_failures": failures,
                "num_image_missing": self._num_missing,
                "confusion": confusion,
                "markdown": markdown,
                "latex": latex,
            },
            numbers={"accuracy": accuracy["Avg"] or 0.0, "parse_failure_rate": failure_rate},
            scores=[{} for _ in choices],
            summary=[f"{header}\n{markdown}", f"parse failures: {failures} of {len(choices)}"],
        )

    def _choices(self, predictions: Sequence[str | int | None]) -> list[int | None]:
        return [
            read_letter(said, problem.num_choices) if isinstance(said, str) else said
            for problem, said in zip(self._problems, predictions, strict=True)
        ]


def _cells(accuracy: Mapping[str, float | None], empty: str) -> list[str]:
    return [empty if percent is None else f"{percent:.2f}" for percent in accuracy.values()]
