from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dehvf_ds.config import UserError
from dehvf_ds.data.building.sources import BadRows, read_scienceqa
from dehvf_ds.data.prompts import scienceqa_target
from dehvf_ds.evals.scienceqa import (
    COLUMNS,
    Problem,
    latex_row,
    markdown_header,
    markdown_row,
    problem_of,
    read_answers,
    read_letter,
    score,
)

SCIENCEQA = Path(__file__).resolve().parents[3] / "shared" / "data" / "scienceqa"

needs_scienceqa = pytest.mark.skipif(
    not SCIENCEQA.is_dir(), reason=f"ScienceQA's problems are not at {SCIENCEQA}"
)

# Invented. Each line: id, answer, choices, subject, grade, hint, image.
ROWS = [
    ("p1", 0, 2, "natural science", 1, True, True),
    ("p2", 1, 2, "natural science", 6, True, False),
    ("p3", 2, 3, "natural science", 7, False, True),
    ("p4", 0, 3, "social science", 12, False, False),
    ("p5", 3, 4, "social science", 6, False, True),
    ("p6", 1, 2, "language science", 10, True, False),
]
FIELDS = ("id", "answer", "num_choices", "subject", "grade", "has_hint", "has_image")
PROBLEMS = [Problem(**dict(zip(FIELDS, row, strict=True))) for row in ROWS]
PREDICTIONS = {"p1": 0, "p2": 0, "p3": 2, "p4": None, "p5": 3, "p6": 1}

RECORD = {
    "question": "Which of these is a star?",
    "choices": ["the Moon", "Mars", "the Sun"],
    "answer": 2,
    "hint": "",
    "image": None,
    "grade": "grade12",
    "subject": "natural science",
}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" A", "A"),
        ("A", "A"),
        (" B.", "B"),
        ("\nC.\n", "C"),
        ("D \n", "D"),
        (" B. BECAUSE: an apple falls.", "B"),
        (" B.\n\nQuestion: What?", "B"),
        ("The answer is C.", "C"),
        (" The answer is C", "C"),
        ("It is red. The answer is\nC.", "C"),
        ("A dog barks. The answer is C.", "C"),
        ("The answer is C. BECAUSE: The answer is C.", "C"),
        ("B. The answer is B.", "B"),
        ("é 你好 The answer is A.", "A"),
        ("", None),
        (" \n", None),
        (".", None),
        (" Apple", None),
        (" A dog", None),
        (" A,", None),
        (" A)", None),
        ("(A)", None),
        (" (A) the wind", None),
        ("A.5", None),
        ("A..", None),
        ("A .", None),
        ("AB.", None),
        (" a.", None),
        ("The Answer is A.", None),
        ("The answer is Apple.", None),
        ("The answer is (A).", None),
        ("The answer is A dog.", None),
        ("The answer isA.", None),
        ("The answer: A.", None),
        ("xThe answer is A.", None),
        ("It is A.", None),
        ("the wind A", None),
        ("A. The answer is B.", None),
        ("The answer is A. The answer is B.", None),
        ("E.", None),
        ("Z", None),
        ("The answer is E.", None),
        ("\u0410.", None),  # Cyrillic
        ("\uff21.", None),  # full width
        ("A\u0301.", None),  # with an accent of its own
        ("\x00A", None),
        ("\ufeffA", None),
    ],
)
def test_letters_of_four_choices(text: str, letter: str | None) -> None:
    assert read_letter(text, 4) == (None if letter is None else "ABCD".index(letter))


@pytest.mark.parametrize("num_choices", range(2, 27))
def test_letters_beyond_the_choices_are_failures(num_choices: int) -> None:
    choices = [str(number) for number in range(num_choices)]
    for answer in range(26):
        expected = answer if answer < num_choices else None
        target = scienceqa_target({"choices": choices, "answer": answer})
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


PIECES = [
    "The answer is ",
    "The answer is",
    " The answer is ",
    "The",
    "is",
    "A",
    "B",
    "C",
    "E",
    ".",
    "A.",
    "Apple",
    "a",
    "\u0410",
    " ",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(), st.integers(2, 5))
@example("The answer is A. The answer is B.", 3)
def test_letters_follow_the_rule(text: str, num_choices: int) -> None:
    assert read_letter(text, num_choices) == letter_by_words(text, num_choices)


@given(st.text(st.characters(exclude_characters="ABCDE")), st.integers(2, 5))
def test_text_without_a_valid_letter_is_a_failure(text: str, num_choices: int) -> None:
    assert read_letter(text, num_choices) is None
    assert read_letter(f"The answer is {text}", num_choices) is None


@given(st.integers(2, 26), st.data())
def test_what_follows_a_letter_without_a_stop_makes_it_a_failure(num_choices: int, data) -> None:
    letter = chr(ord("A") + data.draw(st.integers(0, num_choices - 1)))
    tail = data.draw(st.text(min_size=1).filter(lambda text: text.strip() and not text.startswith(".")))
    assert read_letter(f" {letter}{tail}".replace("The answer is", ""), num_choices) is None


def test_a_record_becomes_a_problem() -> None:
    expected = Problem(
        id="000007",
        answer=2,
        num_choices=3,
        subject="natural science",
        grade=12,
        has_hint=False,
        has_image=True,
    )
    assert problem_of(RECORD, "000007", True) == expected
    assert not problem_of(RECORD, "000007", False).has_image
    for hint, has in [("Look.", True), (" \n", False), (None, False)]:
        # A caption of the picture is no text context.
        record = RECORD | {"hint": hint, "image_caption": "a sky"}
        assert problem_of(record, "000007", True).has_hint is has


@pytest.mark.parametrize("name", ["choices", "answer", "subject", "grade", "hint"])
def test_a_record_that_lacks_a_field(name: str) -> None:
    record = {field: value for field, value in RECORD.items() if field != name}
    with pytest.raises(UserError, match=rf"000007: not a problem of ScienceQA: lacks {name}$"):
        problem_of(record, "000007", False)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"choices": "ABC"}, "choices is not a list of 2 to 26"),
        ({"choices": ["one"], "answer": 0}, "choices is not a list of 2 to 26"),
        ({"choices": ["x"] * 27}, "choices is not a list of 2 to 26"),
        ({"answer": 3}, "answer 3 is no number of its 3 choices"),
        ({"answer": -1}, "answer -1 is no"),
        ({"answer": "C"}, "answer 'C' is no"),
        ({"answer": True}, "answer True is no"),
        ({"answer": None}, "answer None is no"),
        ({"subject": "physics"}, "subject 'physics' is none of natural science, "),
        ({"subject": ["x"]}, "subject .* is none of"),
        ({"grade": "grade0"}, "grade 'grade0' is none of grade1 .. grade12"),
        ({"grade": "grade13"}, "grade 'grade13' is none"),
        ({"grade": "grade1\n"}, "grade .* is none"),
        ({"grade": 4}, "grade 4 is none"),
        ({"hint": 5}, "hint is int, not a text"),
    ],
)
def test_a_record_with_a_wrong_field(change, part: str) -> None:
    with pytest.raises(UserError, match=f"^000007: {part}"):
        problem_of(RECORD | change, "000007", False)


def test_columns_by_hand() -> None:
    scores = score(iter(PROBLEMS), PREDICTIONS)
    counts = {name: (column.num_correct, column.num_problems) for name, column in scores.columns.items()}
    assert counts == {
        "NAT": (2, 3),
        "SOC": (1, 2),
        "LAN": (1, 1),
        "TXT": (2, 3),
        "IMG": (3, 3),
        "NO": (0, 1),
        "G1-6": (2, 3),
        "G7-12": (2, 3),
        "Avg": (4, 6),
    }
    assert tuple(scores.columns) == COLUMNS
    assert scores.columns["Avg"].percent == pytest.approx(66.6666667)
    assert scores.parse_failures == ("p4",)
    assert scores.parse_failure_percent == pytest.approx(16.6666667)
    assert scores.confusion == {
        2: [[1, 0, 0], [1, 1, 0]],
        3: [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
        4: [[0] * 5, [0] * 5, [0] * 5, [0, 0, 0, 1, 0]],
    }


def test_a_column_without_problems_is_none() -> None:
    scores = score(PROBLEMS[:1], {"p1": None})
    percents = {name: column.percent for name, column in scores.columns.items()}
    assert percents == {
        **dict.fromkeys(["NAT", "TXT", "IMG", "G1-6", "Avg"], 0.0),
        **dict.fromkeys(["SOC", "LAN", "NO", "G7-12"]),
    }
    assert scores.parse_failure_percent == 100


def test_rows_as_the_papers_print_them() -> None:
    scores = score(PROBLEMS, PREDICTIONS)
    assert markdown_row("DEHVF | 7B", scores) == (
        "| DEHVF \\| 7B | 66.67 | 50.00 | 100.00 | 66.67 | 100.00 | 0.00 | 66.67 | 66.67 | 66.67 |"
    )
    assert latex_row("DEHVF_7B & 4\nM", scores) == (
        r"DEHVF\_7B \& 4 M & 66.67 & 50.00 & 100.00 & 66.67 & 100.00 & 0.00 & 66.67 & 66.67 & 66.67 \\"
    )
    assert markdown_header() == (
        "| Method | NAT | SOC | LAN | TXT | IMG | NO | G1-6 | G7-12 | Avg |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    bare = score(PROBLEMS[:1], {"p1": 0})
    assert markdown_row("é", bare) == "| é | 100.00 | - | - | 100.00 | 100.00 | - | 100.00 | - | 100.00 |"
    assert latex_row("a\\b", bare).startswith(r"a\textbackslash{}b & 100.00 & -- & --")


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (
            {},
            r"^6 of 6 problems have no prediction \(p1, p2, p3, \.\.\.\); are they of the same split\?$",
        ),
        ({f"p{i}": 0 for i in range(1, 6)}, r"1 of 6 problems have no prediction \(p6\)"),
        (PREDICTIONS | dict.fromkeys(["q1", "q2", "q3"]), r"\(q1, q2, q3\)"),
        (PREDICTIONS | {"q9": 0, "q8": None}, r"^2 of 8 predictions are of no problem here \(q9, q8\)"),
        (
            {f"q{i}": 0 for i in range(6)},
            r"^6 of 6 problems .* and 6 of 6 predictions are of no problem here \(q0, q1, q2, \.\.\.\)",
        ),
        (PREDICTIONS | {"p2": 2}, "1 predictions are no number of a choice, from 0: p2"),
        (PREDICTIONS | {"p2": -1, "p3": "A", "p4": True, "p5": 1.0}, "4 predictions .*: p2, p3, p4, ..."),
    ],
)
def test_predictions_that_do_not_fit(predictions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(PROBLEMS, predictions)


def test_problems_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="no problem to score"):
        score([], {})
    with pytest.raises(UserError, match="1 ids are given to more than one problem: p1"):
        score([*PROBLEMS, PROBLEMS[0]], PREDICTIONS)


def test_answers_are_read_and_failures_are_named() -> None:
    texts = ["", " Apple", " C.", "\u0410.", "The answer is D.", " B"]
    answers = read_answers(PROBLEMS, ((f"p{i}", text) for i, text in enumerate(texts, start=1)))
    assert answers == {"p1": None, "p2": None, "p3": 2, "p4": None, "p5": 3, "p6": 1}
    scores = score(PROBLEMS, answers)
    assert scores.parse_failures == ("p1", "p2", "p4")
    assert scores.columns["Avg"].num_problems == 6
    assert read_answers(PROBLEMS, []) == {}


def test_answers_that_do_not_fit() -> None:
    # The same text twice is a mistake too: a rank's rows were counted twice.
    with pytest.raises(UserError, match=r"^2 problems are answered more than once: p2, p1$"):
        read_answers(PROBLEMS, [("p2", "A"), ("p1", "A"), ("p1", "A"), ("p2", "B")])
    with pytest.raises(UserError, match=r"^1 of 2 predictions are of no problem here \(é\)"):
        read_answers(PROBLEMS, [("é", "A"), ("p1", "A")])


NUMBERS = st.tuples(
    st.integers(2, 5),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(0, 4)),
    st.sampled_from(["natural science", "social science", "language science"]),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(NUMBERS, min_size=1, max_size=30))
def test_counts_add_up(numbers) -> None:
    problems, predictions = [], {}
    for place, (size, answer, choice, *facts) in enumerate(numbers):
        row = (str(place), answer % size, size, *facts)
        problems.append(Problem(**dict(zip(FIELDS, row, strict=True))))
        predictions[str(place)] = None if choice is None else choice % size
    scores = score(problems, predictions)
    columns, everyone = scores.columns, scores.columns["Avg"]
    for group in (("NAT", "SOC", "LAN"), ("G1-6", "G7-12")):
        assert sum(columns[name].num_problems for name in group) == everyone.num_problems == len(numbers)
        assert sum(columns[name].num_correct for name in group) == everyone.num_correct
    both = sum(problem.has_hint and problem.has_image for problem in problems)
    assert sum(columns[name].num_problems for name in ("TXT", "IMG", "NO")) - both == len(numbers)
    matrices = scores.confusion.values()
    assert sum(sum(map(sum, matrix)) for matrix in matrices) == len(numbers)
    assert sum(matrix[i][i] for matrix in matrices for i in range(len(matrix))) == everyone.num_correct
    assert sum(row[-1] for matrix in matrices for row in matrix) == len(scores.parse_failures)


# The papers' columns over the raw fields of problems.json.
RAW_COLUMNS = {
    "NAT": lambda raw: raw["subject"] == "natural science",
    "SOC": lambda raw: raw["subject"] == "social science",
    "LAN": lambda raw: raw["subject"] == "language science",
    "TXT": lambda raw: raw["hint"] != "",
    "IMG": lambda raw: raw["image"] is not None,
    "NO": lambda raw: raw["hint"] == "" and raw["image"] is None,
    "G1-6": lambda raw: raw["grade"] in [f"grade{n}" for n in range(1, 7)],
    "G7-12": lambda raw: raw["grade"] in [f"grade{n}" for n in range(7, 13)],
    "Avg": lambda raw: True,
}


def clumsy_texts(raws: list[dict]) -> list[str]:
    """Right, wrong and unreadable answers in turn."""
    shapes = [" {right}.", "The answer is {right}.", " {next}", "", " Apple", "É {right}", "{right}. {right}"]
    return [
        shapes[place % len(shapes)].format(
            right="ABCDE"[raw["answer"]], next="ABCDE"[(raw["answer"] + 1) % len(raw["choices"])]
        )
        for place, raw in enumerate(raws)
    ]


def random_texts(raws: list[dict]) -> list[str]:
    draw = random.Random(17)
    return [f" {'ABCDE'[draw.randrange(len(raw['choices']))]}." for raw in raws]


PREDICTORS = {
    "always A": lambda raws: [" A."] * len(raws),
    "always E": lambda raws: [" E"] * len(raws),
    "random": random_texts,
    "perfect": lambda raws: [scienceqa_target(raw) for raw in raws],
    "empty": lambda raws: [""] * len(raws),
    "clumsy": clumsy_texts,
}
CLUMSY_READS = {0: "right", 1: "right", 2: "next", 6: "right"}


def raw_choice(predictor: str, place: int, text: str, raw: dict) -> int | None:
    """What each predictor's text means, known from how it was made."""
    answer, size = raw["answer"], len(raw["choices"])
    if predictor == "clumsy":
        return {"right": answer, "next": (answer + 1) % size}.get(CLUMSY_READS.get(place % 7, ""))
    if predictor == "always E":
        return 4 if size == 5 else None
    fixed = {"always A": 0, "perfect": answer, "empty": None}
    return fixed[predictor] if predictor in fixed else "ABCDE".index(text[1])


def real_problems(split: str) -> list[Problem]:
    rows = read_scienceqa(SCIENCEQA, split, allow_missing_images=True, bad=BadRows(skip=False))
    return [problem_of(row.record, row.name, bool(row.record["image"])) for row in rows]


@needs_scienceqa
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("split", ["train", "val", "test", "minitest"])
def test_real_problems(split: str, predictor: str) -> None:
    everything = json.loads((SCIENCEQA / "problems.json").read_text(encoding="utf-8"))
    pids = json.loads((SCIENCEQA / "pid_splits.json").read_text(encoding="utf-8"))[split]
    raws = [everything[pid] for pid in pids]
    keys = [f"{int(pid):06}" for pid in pids]
    texts = PREDICTORS[predictor](raws)
    problems = real_problems(split)
    scores = score(problems, read_answers(problems, zip(keys, texts, strict=True)))

    choices = [raw_choice(predictor, place, texts[place], raw) for place, raw in enumerate(raws)]
    answered = list(zip(keys, raws, choices, strict=True))
    for name, belongs in RAW_COLUMNS.items():
        right = [choice == raw["answer"] for _, raw, choice in answered if belongs(raw)]
        column = scores.columns[name]
        assert (column.num_correct, column.num_problems) == (sum(right), len(right))
        assert column.percent == pytest.approx(sum(right) / len(right) * 100)
    unread = [key for key, _, choice in answered if choice is None]
    assert list(scores.parse_failures) == unread
    assert scores.parse_failure_percent == pytest.approx(len(unread) / len(raws) * 100)
    assert set(scores.confusion) == {len(raw["choices"]) for raw in raws}
    for size, matrix in scores.confusion.items():
        given = [(raw["answer"], choice) for _, raw, choice in answered if len(raw["choices"]) == size]
        assert matrix == [[given.count((a, c)) for c in [*range(size), None]] for a in range(size)]


@needs_scienceqa
def test_real_predictions_of_another_split() -> None:
    val, test = real_problems("val"), real_problems("test")
    message = rf"^{len(test)} of {len(test)} problems have no prediction .*; are they of the same split\?$"
    with pytest.raises(UserError, match=message):
        score(test, {problem.id: problem.answer for problem in val})
    perfect = {problem.id: problem.answer for problem in val + test}
    with pytest.raises(UserError, match=f"^{len(val)} of {len(perfect)} predictions are of no problem here"):
        score(test, perfect)


def test_a_perfect_predictor_and_one_that_always_says_a() -> None:
    perfect = score(PROBLEMS, {problem.id: problem.answer for problem in PROBLEMS})
    assert {column.percent for column in perfect.columns.values()} == {100.0}
    always_a = score(PROBLEMS, dict.fromkeys(PREDICTIONS, 0))
    # p1 and p4 are A's.
    assert [column.num_correct for column in always_a.columns.values()] == [1, 1, 0, 1, 1, 1, 1, 1, 2]


def test_a_random_predictor_is_as_good_as_chance() -> None:
    draw = random.Random(5)
    sizes = [draw.choice([2, 2, 3, 4]) for _ in range(4000)]
    problems = [
        Problem(
            id=str(place),
            answer=draw.randrange(size),
            num_choices=size,
            subject="social science",
            grade=3,
            has_hint=False,
            has_image=False,
        )
        for place, size in enumerate(sizes)
    ]
    scores = score(problems, {problem.id: draw.randrange(problem.num_choices) for problem in problems})
    chance = 100 * sum(1 / size for size in sizes) / len(sizes)
    # Four standard deviations.
    assert scores.columns["Avg"].percent == pytest.approx(chance, abs=4 * 50 / len(sizes) ** 0.5)
    assert scores.columns["NO"] == scores.columns["SOC"] == scores.columns["G1-6"] == scores.columns["Avg"]
