"""What the demo promises, and that a demo which does not keep it is told from one that does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.demo import outcome
from dehvf_ds.demo.show import RUN, RUN_BLIND, TEST_SCORES

CAPTIONS = {f"{number}.png": f"a red star number {number}" for number in range(8)}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch) -> dict[Path, dict[str, str]]:
    """A demo that keeps its promises: its scores on disk, its captions by model."""
    monkeypatch.chdir(tmp_path)
    for run, cider in ((RUN, 226.0), (RUN_BLIND, 40.0)):
        (run / TEST_SCORES).parent.mkdir(parents=True)
        (run / TEST_SCORES).write_text(json.dumps({"CIDEr": cider}))
    line = {"prediction": "A red star.", "references": ["A striped red ring.", "No other counts."]}
    (RUN / TEST_SCORES).with_name("predictions.jsonl").write_text(json.dumps(line) + "\n")
    captions = {RUN: dict(CAPTIONS), RUN / "merged": dict(CAPTIONS)}
    monkeypatch.setattr(outcome, "caption", lambda model, pictures: captions[model])
    return captions


def test_a_demo_that_keeps_its_promises(demo, capsys) -> None:
    assert outcome.main() == 0
    assert "color 1.000, texture 0.000, shape 0.000" in capsys.readouterr().out


def test_words_are_counted_as_often_as_they_are_said() -> None:
    assert outcome.score_words([("Red, red and a dotted star", "A red dotted star and a blue ring.")]) == {
        "color": 2 / 4,
        "texture": 1.0,
        "shape": 2 / 3,
    }


@pytest.mark.parametrize(
    ("cider", "blind", "message"),
    [
        (99.0, 10.0, "CIDEr 99.0 on unseen scenes; at least 100"),
        (226.0, 80.0, "not 3 times the 80.0"),
        (float("nan"), 10.0, "CIDEr nan"),
    ],
)
def test_a_score_below_the_promise(demo, capsys, cider: float, blind: float, message: str) -> None:
    (RUN / TEST_SCORES).write_text(json.dumps({"CIDEr": cider}))
    (RUN_BLIND / TEST_SCORES).write_text(json.dumps({"CIDEr": blind}))
    assert outcome.main() == 1
    assert message in capsys.readouterr().err


def test_another_caption_of_the_merged_model_is_named(demo, capsys) -> None:
    demo[RUN / "merged"]["3.png"] = "a blue star"
    assert outcome.main() == 1
    assert (
        "3.png: the run says 'a red star number 3', the merged model 'a blue star'" in capsys.readouterr().err
    )


def test_too_few_captions_prove_nothing(demo, capsys) -> None:
    demo[RUN].popitem()
    assert outcome.main() == 1
    assert "captions of 7 and 8 pictures" in capsys.readouterr().err


def test_no_demo_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome.main() == 2
    assert "make demo" in capsys.readouterr().err
