"""What the demo promises, and that a demo which does not keep it is told from one that does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.demo import outcome
from dehvf_ds.demo.outcome import EVALUATION, RUN, RUN_BLIND

CAPTIONS = {f"{number}.png": f"a red star number {number}" for number in range(8)}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch) -> Callable[[float, float, dict[str, str]], int]:
    """Judges a demo of these scores whose export says this."""
    monkeypatch.chdir(tmp_path)

    def judge(cider: float = 226.0, blind: float = 40.0, merged: dict[str, str] = CAPTIONS) -> int:
        line = {"prediction": "A red star.", "references": ["A striped red ring.", "No other counts."]}
        for run, score in ((RUN, cider), (RUN_BLIND, blind)):
            (run / EVALUATION).mkdir(parents=True, exist_ok=True)
            (run / EVALUATION / "metrics.json").write_text(json.dumps({"CIDEr": score}))
            (run / EVALUATION / "predictions.jsonl").write_text(json.dumps(line) + "\n")
        said = {RUN: CAPTIONS, RUN / "merged": merged}
        monkeypatch.setattr(outcome, "caption", lambda model, pictures: said[model])
        return outcome.main()

    return judge


def test_a_demo_that_keeps_its_promises(demo, capsys) -> None:
    assert demo() == 0
    assert "color 1.000, texture 0.000, shape 0.000" in capsys.readouterr().out
    # Words count as often as they are said.
    found = outcome.score_words([("Red, red and a dotted star", "A red dotted star and a blue ring.")])
    assert found == {"color": 2 / 4, "texture": 1.0, "shape": 2 / 3}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"blind": 80.0}, "not 3 times the 80.0"),
        ({"cider": float("nan")}, "CIDEr nan"),
        ({"merged": CAPTIONS | {"3.png": "a star"}}, "'a red star number 3', the merged model 'a star'"),
    ],
)
def test_a_broken_promise_is_named(demo, capsys, broken, message: str) -> None:
    assert demo(**broken) == 1
    assert message in capsys.readouterr().err


def test_no_demo_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for entry in (outcome.main, outcome.show):
        with pytest.raises(UserError, match=r"No such file.*make demo"):
            entry()
