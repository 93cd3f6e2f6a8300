from __future__ import annotations

import pytest

from dehvf_ds.data.prompts import build_prompt, build_target

PROBLEM = {"question": "Which is a dog?", "choices": ["a cat", "Rex"], "answer": 1, "hint": " Look. "}


def test_caption():
    assert build_prompt({}, "caption") == "Caption of the picture:"
    assert build_prompt({}, "caption", prompt="Describe it: ") == "Describe it:"
    assert build_target({"caption": " A  dog\nruns. "}, "caption") == "A dog runs."


@pytest.mark.parametrize(
    ("hint", "image_caption", "context"),
    [
        (" Look. ", None, "Look."),
        ("Look.", "a dog", "Look. a dog"),
        ("", "a dog", "a dog"),
        ("", None, "N/A"),
        (None, " ", "N/A"),
    ],
)
def test_scienceqa_prompt(hint, image_caption, context):
    found = build_prompt({**PROBLEM, "hint": hint}, "scienceqa", image_caption=image_caption)
    assert found == (f"Question: Which is a dog?\nContext: {context}\nOptions: (A) a cat (B) Rex\nResponse:")


def test_scienceqa_target():
    assert build_target(PROBLEM, "scienceqa") == "The answer is B."
