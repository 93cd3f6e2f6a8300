"""Every row is answered once, whoever is killed, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dehvf_ds.config import UserError
from dehvf_ds.distributed import World
from dehvf_ds.evaluation import predict
from dehvf_ds.evaluation.predict import PredictionCache, predict_rows

LENGTHS = [3, 9, 1, 4, 4, 8, 2]


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, size, torch.device("cpu"))


class Asked:
    """Answers with the row's number, and remembers what it was asked; may die at a call."""

    def __init__(self, dies_at: int | None = None):
        self.calls: list[list[int]] = []
        self._dies_at = dies_at

    def __call__(self, rows) -> list[str]:
        if len(self.calls) == self._dies_at:
            raise KeyboardInterrupt
        self.calls.append(list(rows))
        return [f"größe {row}" for row in rows]


def test_longest_first_and_answers_in_the_rows_order(tmp_path: Path) -> None:
    ask = Asked()
    answers = predict_rows(LENGTHS, ask, PredictionCache(tmp_path, {}, 0), world(), 3)
    assert answers == [f"größe {row}" for row in range(7)]
    assert ask.calls == [[1, 5, 3], [4, 0, 6], [2]]


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(tmp_path: Path, capsys) -> None:
    first, second = Asked(dies_at=2), Asked()
    with pytest.raises(KeyboardInterrupt):
        predict_rows(LENGTHS, first, PredictionCache(tmp_path, {"model": 1}, 0), world(), 2)
    cache = PredictionCache(tmp_path, {"model": 1}, 0)
    # Killed in the middle of a line.
    with next(cache.directory.glob("*.jsonl")).open("a") as file:
        file.write('[2, "gr')
    answers = predict_rows(LENGTHS, second, cache, world(), 2)
    assert answers == [f"größe {row}" for row in range(7)]
    assert sorted(row for call in first.calls + second.calls for row in call) == list(range(7))
    assert "going on after 4 of 7 rows" in capsys.readouterr().out
    # And a third finds all of it there, the line after the torn one too.
    third = Asked()
    assert predict_rows(LENGTHS, third, PredictionCache(tmp_path, {"model": 1}, 0), world(), 2) == answers
    assert third.calls == []
    cache.remove()
    assert list(tmp_path.iterdir()) == []


def test_ranks_have_disjoint_rows_whatever_ranks_there_were_before(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_rows(LENGTHS, Asked(dies_at=1), PredictionCache(tmp_path, {}, 0), world(), 2)
    gathered: list = []
    asked = []
    # Rank 1 first: it writes nothing that rank 0 takes for done before its own reading.
    before = PredictionCache(tmp_path, {}, 0).read()
    monkeypatch.setattr(PredictionCache, "read", lambda self: dict(before))
    monkeypatch.setattr(predict, "gather_to_main", lambda own, place: gathered.extend(own) or gathered)
    for rank in (1, 0):
        ask = Asked()
        answers = predict_rows(LENGTHS, ask, PredictionCache(tmp_path, {}, rank), world(rank, 2), 2)
        asked += [row for call in ask.calls for row in call]
    assert sorted(asked) == sorted(set(range(7)) - set(before))
    assert answers == [f"größe {row}" for row in range(7)]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: Not a directory"):
        PredictionCache(tmp_path / "file", {}, 0)


def test_what_is_cut_off_or_no_answer_is_asked_again(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path, {}, 0)
    cache.add([1, 2], ["a \u2028 b", {"unreadable": "why"}])
    with (cache.directory / "rank-00003.jsonl").open("wb") as file:
        file.write(b'[4, "d"]\n5\nnull\n[6]\n\x00\x00\xff\n[0, "c')
    assert cache.read() == {1: "a \u2028 b", 2: {"unreadable": "why"}, 4: "d"}
