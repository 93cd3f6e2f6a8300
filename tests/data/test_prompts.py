from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase

import pytest

from dehvf_ds.config import ScienceqaConfig
from dehvf_ds.data.prompts import QCM_A, build_prompt, build_target

PROBLEMS = Path(__file__).resolve().parents[3] / "shared/data/scienceqa/problems.json"

# All of these are invented.
KITE = {
    "question": "Which of these makes the kite rise?",
    "choices": ["the wind", "the string"],
    "answer": 0,
    "hint": "Ada runs along the beach.\nHer kite pulls at the string.",
    "image": "image.png",
    "image_caption": "a child with a red kite",
    "lecture": "A force is a push or a pull.\n\nMoving air pushes.\tIt is called wind.",
    "solution": " The wind pushes the kite up. ",
}
PLANETS = {
    "question": "Which of these is a star?",
    "choices": ["the Moon", "Mars", "Venus", "Saturn's rings", "the Sun"],
    "answer": 4,
    "hint": "",
    "image": None,
    "lecture": "",
    "solution": "The Sun gives light of its own.",
}
HINT = "Ada runs along the beach.\nHer kite pulls at the string."
PLANET_OPTIONS = "Options: (A) the Moon (B) Mars (C) Venus (D) Saturn's rings (E) the Sun"


@pytest.mark.parametrize(
    ("problem", "with_caption", "context"),
    [
        (KITE, False, HINT),
        (KITE, True, f"{HINT} a child with a red kite"),
        (KITE | {"hint": ""}, True, "a child with a red kite"),
        (KITE | {"hint": None, "image_caption": " "}, True, "N/A"),
        (PLANETS, True, "N/A"),
    ],
)
def test_scienceqa_prompt(problem, with_caption, context):
    options = PLANET_OPTIONS if problem is PLANETS else "Options: (A) the wind (B) the string"
    form = ScienceqaConfig(image_captions=with_caption)
    assert build_prompt(problem, "scienceqa", scienceqa=form) == (
        f"Question: {problem['question']}\nContext: {context}\n{options}\nResponse:"
    )


LECTURE, SOLUTION = ScienceqaConfig(lecture=True), ScienceqaConfig(solution=True)
BOTH = ScienceqaConfig(lecture=True, solution=True)
WHY = "A force is a push or a pull. Moving air pushes. It is called wind."


@pytest.mark.parametrize(
    ("problem", "form", "target"),
    [
        (KITE, QCM_A, "The answer is A."),
        (KITE, LECTURE, f"The answer is A. BECAUSE: {WHY}"),
        (KITE, SOLUTION, "The answer is A. BECAUSE: The wind pushes the kite up."),
        (KITE, BOTH, f"The answer is A. BECAUSE: {WHY} The wind pushes the kite up."),
        (PLANETS, BOTH, "The answer is E. BECAUSE: The Sun gives light of its own."),
        (PLANETS, LECTURE, "The answer is E."),
        ({"answer": 1, "lecture": None, "solution": " \n"}, BOTH, "The answer is B."),
    ],
)
def test_scienceqa_target(problem, form, target):
    assert build_target(problem, "scienceqa", scienceqa=form) == target


def test_caption():
    assert build_prompt({}, "caption") == "Caption of the picture:"
    assert build_prompt({}, "caption", prompt="Describe it: ") == "Describe it:"
    assert build_target({"caption": " A  dog\nruns. "}, "caption") == "A dog runs."


@pytest.mark.skipif(not PROBLEMS.is_file(), reason=f"no ScienceQA problems at {PROBLEMS}")
def test_all_real_problems_have_the_protocols_form():
    problems = json.loads(PROBLEMS.read_text(encoding="utf-8"))
    assert problems
    for problem in problems.values():
        prompt = build_prompt(problem, "scienceqa")
        last_option = ascii_uppercase[len(problem["choices"]) - 1]
        assert prompt.startswith(f"Question: {problem['question']}\nContext: ")
        assert prompt.endswith("\nResponse:")
        assert f" ({last_option}) {problem['choices'][-1]}\n" in prompt
        assert ("\nContext: N/A\n" in prompt) == (not problem["hint"].strip())
        short, long = (build_target(problem, "scienceqa", scienceqa=form) for form in (QCM_A, BOTH))
        assert short == f"The answer is {ascii_uppercase[problem['answer']]}."
        told = f"{problem['lecture']} {problem['solution']}".split()
        assert long.split() == short.split() + (["BECAUSE:", *told] if told else [])
        assert long == " ".join(long.split())
