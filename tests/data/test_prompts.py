from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase

import pytest

from dehvf_ds.config import ScienceqaConfig
from dehvf_ds.data.prompts import QCM_A, build_prompt, build_target

PROBLEMS = Path(__file__).resolve().parents[3] / "shared/data/scienceqa/problems.json"
CAPTIONED = ScienceqaConfig(image_captions=True)

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

GOLDEN_PROMPTS = {
    "hint": (
        KITE,
        QCM_A,
        "Question: Which of these makes the kite rise?\n"
        "Context: Ada runs along the beach.\nHer kite pulls at the string.\n"
        "Options: (A) the wind (B) the string\n"
        "Response:",
    ),
    "hint and caption": (
        KITE,
        CAPTIONED,
        "Question: Which of these makes the kite rise?\n"
        "Context: Ada runs along the beach.\nHer kite pulls at the string. a child with a red kite\n"
        "Options: (A) the wind (B) the string\n"
        "Response:",
    ),
    "no hint but caption": (
        KITE | {"hint": ""},
        CAPTIONED,
        "Question: Which of these makes the kite rise?\n"
        "Context: a child with a red kite\n"
        "Options: (A) the wind (B) the string\n"
        "Response:",
    ),
    "neither": (
        KITE | {"hint": None, "image_caption": " "},
        CAPTIONED,
        "Question: Which of these makes the kite rise?\n"
        "Context: N/A\n"
        "Options: (A) the wind (B) the string\n"
        "Response:",
    ),
    "no image, five choices": (
        PLANETS,
        CAPTIONED,
        "Question: Which of these is a star?\n"
        "Context: N/A\n"
        "Options: (A) the Moon (B) Mars (C) Venus (D) Saturn's rings (E) the Sun\n"
        "Response:",
    ),
}

LECTURE, SOLUTION = ScienceqaConfig(lecture=True), ScienceqaConfig(solution=True)
BOTH = ScienceqaConfig(lecture=True, solution=True)
GOLDEN_TARGETS = {
    "A": (KITE, QCM_A, "The answer is A."),
    "AL": (
        KITE,
        LECTURE,
        "The answer is A. BECAUSE: A force is a push or a pull. Moving air pushes. It is called wind.",
    ),
    "AE": (KITE, SOLUTION, "The answer is A. BECAUSE: The wind pushes the kite up."),
    "ALE": (
        KITE,
        BOTH,
        "The answer is A. BECAUSE: A force is a push or a pull. Moving air pushes. It is called wind. "
        "The wind pushes the kite up.",
    ),
    "ALE without a lecture": (PLANETS, BOTH, "The answer is E. BECAUSE: The Sun gives light of its own."),
    "AL without a lecture": (PLANETS, LECTURE, "The answer is E."),
    "ALE without either": ({"answer": 1, "lecture": None, "solution": " \n"}, BOTH, "The answer is B."),
}


def test_caption():
    assert build_prompt({}, "caption") == "Caption of the picture:"
    assert build_prompt({}, "caption", prompt="Describe it: ") == "Describe it:"
    assert build_target({"caption": " A  dog\nruns. "}, "caption") == "A dog runs."


@pytest.mark.parametrize("name", GOLDEN_PROMPTS)
def test_scienceqa_prompt(name):
    problem, config, golden = GOLDEN_PROMPTS[name]
    assert build_prompt(problem, "scienceqa", scienceqa=config) == golden


@pytest.mark.parametrize("name", GOLDEN_TARGETS)
def test_scienceqa_target(name):
    problem, config, golden = GOLDEN_TARGETS[name]
    assert build_target(problem, "scienceqa", scienceqa=config) == golden


def test_defaults_are_qcm_a():
    assert build_prompt(KITE, "scienceqa") == GOLDEN_PROMPTS["hint"][2]
    assert build_target(KITE, "scienceqa") == "The answer is A."


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
        assert long == " ".join(long.split())
        told = f"{problem['lecture']} {problem['solution']}".split()
        assert long.split() == short.split() + (["BECAUSE:", *told] if told else [])
