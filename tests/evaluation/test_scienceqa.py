"""ScienceQA: which letter an answer names, and the papers' columns, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data.prompts import build_target
from dehvf_ds.evaluation.predict import Scored
from dehvf_ds.evaluation.scienceqa import COLUMNS, AnswerScorer, read_letter

# Invented: answer, choices, subject, grade, whether it has a hint, whether a picture.
ROWS = [
    (0, 2, "natural science", 1, True, True),
    (1, 2, "natural science", 6, True, False),
    (2, 3, "natural science", 7, False, True),
    (0, 3, "social science", 12, False, False),
    (3, 4, "social science", 6, False, True),
    (1, 2, "language science", 10, True, False),
]
SAID = ["A", "The answer is A.", " C.", "\u0410.", "The answer is D.", " B"]


def records(rows: list[tuple]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            f"p{i}",
            {
                "question": "Which of these is a star?",
                "choices": [f"choice {i}" for i in range(size)],
                "answer": answer,
                "subject": subject,
                "grade": f"grade{grade}",
                "hint": "Look." if hint else " \n",
                "image": "image.png" if image else None,
            },
        )
        for i, (answer, size, subject, grade, hint, image) in enumerate(rows, start=1)
    ]


def scored(rows: list[tuple], said: list[Any], name: str = "run") -> Scored:
    return AnswerScorer(records(rows), name=name).score(said)


NAMED = {
    "A": " A|A|é 你好 The answer is A.",
    "B": " B.| B. BECAUSE: an apple falls.| B.\n\nQuestion: What?|B. The answer is B.",
    "C": "\nC.\n| The answer is C|It is red. The answer is\nC.|A dog barks. The answer is C.",
    "D": "D \n|The answer is D. BECAUSE: The answer is D.",
    # The last ones are Cyrillic, of full width, with an accent of its own.
    "": "| \n|.| Apple| A dog| A,| A)|(A)| (A) the wind|A.5|A..|A .|AB.| a.|The Answer is A."
    "|The answer is Apple.|The answer is (A).|The answer is A dog.|The answer isA.|The answer: A."
    "|xThe answer is A.|It is A.|the wind A|E.|Z|A. The answer is B.|The answer is A. The answer is B."
    "|The answer is E.|\x00A|\ufeffA|\u0410.|\uff21.|A\u0301.",
}


def test_letters_of_four_choices() -> None:
    wanted = {text: letter for letter, texts in NAMED.items() for text in texts.split("|")}
    assert {text: "ABCD"[n] if (n := read_letter(text, 4)) is not None else "" for text in wanted} == wanted


@pytest.mark.parametrize("num_choices", [2, 5, 26])
def test_the_targets_of_training_name_their_letter_and_none_beyond_the_choices(num_choices: int) -> None:
    for answer in range(26):
        target = build_target({"choices": ["x"] * num_choices, "answer": answer}, "scienceqa")
        # The prompt ends in the first three words, so the model writes the rest.
        for text in (target, target.removeprefix("The answer is")):
            assert read_letter(text, num_choices) == (answer if answer < num_choices else None)


def test_a_record_that_is_no_problem_is_named() -> None:
    ((_, problem),) = records(ROWS[2:3])
    with pytest.raises(UserError, match=r"^000007: answer 3 is not an index into its 3 choices"):
        AnswerScorer([("000007", problem | {"answer": 3})], name="run")
    del problem["grade"]
    with pytest.raises(UserError, match=r"000007: not a problem of ScienceQA: lacks grade$"):
        AnswerScorer([("000007", problem)], name="run")


def test_columns_by_hand() -> None:
    found = scored(ROWS, SAID)
    third = pytest.approx(66.6667)
    accuracy = [third, 50, 100, third, 100, 0, third, third, third]
    assert found.metrics["accuracy"] == dict(zip(COLUMNS, accuracy, strict=True))
    assert found.metrics["num_problems"] == dict(zip(COLUMNS, [3, 2, 1, 3, 3, 1, 3, 3, 6], strict=True))
    rates = {"accuracy": pytest.approx(100 * 4 / 6), "parse_failure_rate": pytest.approx(100 / 6)}
    assert found.numbers == rates
    assert found.metrics["num_parse_failures"] == 1
    assert found.metrics["confusion"] == {
        2: [[1, 0, 0], [1, 1, 0]],
        3: [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
        4: [[0] * 5, [0] * 5, [0] * 5, [0, 0, 0, 1, 0]],
    }
    lines = AnswerScorer(records(ROWS), name="run").lines(SAID)
    assert [line["choice"] for line in lines] == [0, 0, 2, None, 3, 1]
    assert [line["answer"] for line in lines] == [row[0] for row in ROWS]
    # The likeliest options, as numbers.
    assert scored(ROWS, [0, 0, 2, None, 3, 1]).metrics == found.metrics


def test_rows_as_the_papers_print_them() -> None:
    found = scored(ROWS, SAID, name="DEHVF_7B |\n4")
    cells = ["66.67", "50.00", "100.00", "66.67", "100.00", "0.00", "66.67", "66.67", "66.67"]
    assert found.metrics["markdown"] == f"| DEHVF_7B \\| 4 | {' | '.join(cells)} |"
    assert found.metrics["latex"] == rf"DEHVF\_7B | 4 & {' & '.join(cells)} \\"
    assert found.summary[0].startswith(
        "| Method | NAT | SOC | LAN | TXT | IMG | NO | G1-6 | G7-12 | Avg |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n| DEHVF_7B"
    )
    bare = scored(ROWS[:1], [0])
    assert bare.metrics["markdown"].endswith("| 100.00 | - | - | 100.00 | 100.00 | - | 100.00 | - | 100.00 |")
    assert bare.metrics["accuracy"]["SOC"] is None
