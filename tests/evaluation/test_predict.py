"""Every row is answered once, whoever is killed, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dehvf_ds.distributed import World
from dehvf_ds.evaluation import predict
from dehvf_ds.evaluation.predict import PredictionCache, predict_rows

LENGTHS = [3, 9, 1, 4, 4, 8, 2]
ANSWERS = [f"größe {row}" for row in range(7)]


class Asked:
    """Answers rows, and remembers which; may die at a call."""

    def __init__(self, dies_at: int | None = None):
        self.calls: list[list[int]] = []
        self._dies_at = dies_at

    def __call__(self, rows) -> list[str]:
        if len(self.calls) == self._dies_at:
            raise KeyboardInterrupt
        self.calls.append(list(rows))
        return [ANSWERS[row] for row in rows]


def ask(directory: Path, asked: Asked, rank: int = 0, size: int = 1) -> list:
    world = World(rank, rank, size, size, torch.device("cpu"))
    return predict_rows(LENGTHS, asked, PredictionCache(directory, {"model": 1}, rank), world, 2)


def test_a_killed_evaluation_resumes_and_asks_nothing_twice(tmp_path: Path, capsys) -> None:
    first, second, third = Asked(dies_at=2), Asked(), Asked()
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, first)
    # The longest first.
    assert first.calls == [[1, 5], [3, 4]]
    cache = PredictionCache(tmp_path, {"model": 1}, 0)
    # Killed in the middle of a line.
    with next(cache.directory.glob("*.jsonl")).open("a") as file:
        file.write('[2, "gr')
    assert ask(tmp_path, second) == ANSWERS
    assert second.calls == [[0, 6], [2]]
    assert "resuming after 4 of 7 rows" in capsys.readouterr().out
    # The line after the torn one is found, too.
    assert ask(tmp_path, third) == ANSWERS
    assert third.calls == []
    # Damaged lines of another rank are passed over.
    (cache.directory / "rank-00003.jsonl").write_bytes(b'[9, "d"]\n5\nnull\n[6]\n\x00\x00\xff\n[0, "c')
    cache.add([8], [{"unreadable": "\u2028"}])
    assert cache.read() == dict(enumerate(ANSWERS)) | {8: {"unreadable": "\u2028"}, 9: "d"}
    cache.remove()
    assert list(tmp_path.iterdir()) == []


def test_ranks_have_disjoint_rows_whatever_ranks_there_were_before(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, Asked(dies_at=1))
    gathered: list = []
    asked = Asked()
    # Rank 1 runs first here, and must not write what rank 0 reads as done.
    before = PredictionCache(tmp_path, {"model": 1}, 0).read()
    monkeypatch.setattr(PredictionCache, "read", lambda self: dict(before))
    monkeypatch.setattr(predict, "gather_to_main", lambda own, place: gathered.extend(own) or gathered)
    answers = [ask(tmp_path, asked, rank, 2) for rank in (1, 0)]
    assert sorted(row for call in asked.calls for row in call) == sorted(set(range(7)) - set(before))
    assert answers == [[], ANSWERS]
