"""ScienceQA: which letter an answer names, and the papers' columns, against counts by hand and by chance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dehvf_ds.config import UserError
from dehvf_ds.data.building.sources import BadRows, read_scienceqa
from dehvf_ds.data.prompts import build_target
from dehvf_ds.evaluation.predict import Scored
from dehvf_ds.evaluation.scienceqa import COLUMNS, AnswerScorer, read_letter

SCIENCEQA = Path(__file__).resolve().parents[3] / "shared" / "data" / "scienceqa"

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


def record(answer: int, size: int, subject: str, grade: int, hint: bool, image: bool) -> dict[str, Any]:
    return {
        "question": "Which of these is a star?",
        "choices": [f"choice {i}" for i in range(size)],
        "answer": answer,
        "subject": subject,
        "grade": f"grade{grade}",
        "hint": "Look." if hint else " \n",
        "image": "image.png" if image else None,
    }


def scored(rows: list[tuple], said: list[Any], name: str = "run") -> Scored:
    records = [(f"p{i}", record(*row)) for i, row in enumerate(rows, start=1)]
    return AnswerScorer(records, name=name).score(said)


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


@pytest.mark.parametrize("num_choices", range(2, 27))
def test_letters_beyond_the_choices_are_failures(num_choices: int) -> None:
    choices = [str(number) for number in range(num_choices)]
    for answer in range(26):
        expected = answer if answer < num_choices else None
        target = build_target({"choices": choices, "answer": answer}, "scienceqa")
        assert read_letter(target, num_choices) == expected
        # The prompt ends in the first three words, so the model writes the rest.
        assert read_letter(target.removeprefix("The answer is"), num_choices) == expected


def letter_by_words(text: str, num_choices: int) -> int | None:
    """The docstring's rule once more, word by word."""
    words = re.split(r"(\s+)", text.strip())
    found = set()
    for place in range(0, len(words), 2):
        word = words[place]
        last = place == len(words) - 1
        if len(word) == 2 and word[1] == ".":
            letter = word[0]
        elif len(word) == 1 and last:
            letter = word
        else:
            continue
        led = "".join(words[max(0, place - 6) : place]).rstrip() == "The answer is" and place >= 6
        if (place == 0 or led) and "A" <= letter <= "Z":
            found.add(ord(letter) - ord("A"))
    return found.pop() if len(found) == 1 and max(found) < num_choices else None


PIECES = ["The answer is ", "The answer is", " The answer is ", "The", "is", "A", "B", "C", "E", ".", "A."]
PIECES += ["a", "Apple", "\u0410", " ", "\n"]


@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(), st.integers(2, 5))
@example("The answer is A. The answer is B.", 3)
def test_letters_follow_the_rule(text: str, num_choices: int) -> None:
    assert read_letter(text, num_choices) == letter_by_words(text, num_choices)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"choices": ["one"], "answer": 0}, "choices is not a list of 2 to 26"),
        ({"answer": 3}, "answer 3 is no number of its 3 choices"),
        ({"subject": "physics"}, "subject 'physics' is none of natural science, "),
        ({"grade": "grade13"}, "grade 'grade13' is none of grade1 .. grade12"),
        ({"hint": 5}, "hint is int, not a text"),
    ],
)
def test_a_record_that_is_no_problem_is_named(change, part: str) -> None:
    problem = record(*ROWS[2])
    with pytest.raises(UserError, match=f"^000007: {part}"):
        AnswerScorer([("000007", problem | change)], name="run")
    (field, *_) = change
    with pytest.raises(UserError, match=f"000007: not a problem of ScienceQA: lacks {field}$"):
        AnswerScorer([("000007", {k: v for k, v in problem.items() if k != field})], name="run")


def test_columns_by_hand() -> None:
    found = scored(ROWS, SAID)
    third = pytest.approx(66.6667)
    assert found.metrics["accuracy"] == dict(
        zip(COLUMNS, [third, 50, 100, third, 100, 0, third, third, third], strict=True)
    )
    assert found.metrics["num_problems"] == dict(zip(COLUMNS, [3, 2, 1, 3, 3, 1, 3, 3, 6], strict=True))
    assert found.numbers == {
        "accuracy": pytest.approx(100 * 4 / 6),
        "parse_failure_rate": pytest.approx(100 / 6),
    }
    assert found.metrics["num_parse_failures"] == 1
    assert found.metrics["confusion"] == {
        2: [[1, 0, 0], [1, 1, 0]],
        3: [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
        4: [[0] * 5, [0] * 5, [0] * 5, [0, 0, 0, 1, 0]],
    }
    records = [(f"p{i}", record(*row)) for i, row in enumerate(ROWS, start=1)]
    lines = AnswerScorer(records, name="run").lines(SAID)
    assert [line["choice"] for line in lines] == [0, 0, 2, None, 3, 1]
    assert [line["answer"] for line in lines] == [row[0] for row in ROWS]
    # The likeliest options, as numbers.
    numbers = scored(ROWS, [0, 0, 2, None, 3, 1])
    assert numbers.metrics == found.metrics


def test_rows_as_the_papers_print_them() -> None:
    found = scored(ROWS, SAID, name="DEHVF_7B |\n4")
    cells = ["66.67", "50.00", "100.00", "66.67", "100.00", "0.00", "66.67", "66.67", "66.67"]
    assert found.metrics["markdown"] == f"| DEHVF_7B \\| 4 | {' | '.join(cells)} |"
    assert found.metrics["latex"] == rf"DEHVF\_7B | 4 & {' & '.join(cells)} \\"
    assert found.summary[0].startswith(
        "| Method | NAT | SOC | LAN | TXT | IMG | NO | G1-6 | G7-12 | Avg |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n| DEHVF_7B"
    )
    bare = scored(ROWS[:1], [0], name="a\\b")
    assert bare.metrics["markdown"].endswith("| 100.00 | - | - | 100.00 | 100.00 | - | 100.00 | - | 100.00 |")
    assert bare.metrics["latex"].startswith(r"a\textbackslash{}b & 100.00 & -- & --")
    assert bare.metrics["accuracy"]["SOC"] is None


@pytest.mark.skipif(not SCIENCEQA.is_dir(), reason=f"ScienceQA's problems are not at {SCIENCEQA}")
@pytest.mark.parametrize("split", ["val", "test"])
def test_real_problems(split: str) -> None:
    rows = read_scienceqa(SCIENCEQA, split, allow_missing_images=True, bad=BadRows(skip=False))
    raws = [row.record for row in rows]
    said = [(" A.", "B", "", " Apple", "The answer is C.")[i * i % 5] for i in range(len(raws))]
    meant = {" A.": 0, "B": 1, "The answer is C.": 2}
    right = [meant.get(text) == raw["answer"] for text, raw in zip(said, raws, strict=True)]
    metrics = AnswerScorer([(row.name, row.record) for row in rows], name="run").score(said).metrics
    # The papers' columns over the raw fields of problems.json.
    belongs = {
        "LAN": lambda raw: raw["subject"] == "language science",
        "TXT": lambda raw: raw["hint"] != "",
        "IMG": lambda raw: raw["image"] is not None,
        "NO": lambda raw: raw["hint"] == "" and raw["image"] is None,
        "G7-12": lambda raw: raw["grade"] in [f"grade{n}" for n in range(7, 13)],
        "Avg": lambda raw: True,
    }
    for name, holds in belongs.items():
        counted = [one for one, raw in zip(right, raws, strict=True) if holds(raw)]
        assert metrics["num_problems"][name] == len(counted)
        assert metrics["accuracy"][name] == pytest.approx(100 * sum(counted) / len(counted), abs=1e-4)
