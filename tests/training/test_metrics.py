from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dehvf_ds.config import UserError
from dehvf_ds.training.metrics import MetricsWriter, Trackers, check_trackers


def step(number: int, loss: float) -> dict[str, float | None]:
    fixed = {"lr": 1e-3, "seconds": 2.0, "samples_per_s": 4.0, "rows_crc": 2**24 - 1}
    return {"step": number, "train/loss": loss, "train/grad_norm": None, **fixed}


def test_jsonl_and_tensorboard_carry_the_same_numbers(tmp_path, capsys) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, {}, 0)
    writer = MetricsWriter(tmp_path, trackers, num_steps=3, log_every=1)
    for number, loss in enumerate([2.5, float("nan"), 1.5], start=1):
        writer.write(step(number, loss))
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [2.5, None, 1.5]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")][::2] == [2.5, 1.5]
    assert [e.value for e in events.Scalars("rows_crc")] == [2**24 - 1] * 3
    assert "step 3/3  loss 1.5000" in capsys.readouterr().out


def test_a_resumed_run_drops_later_lines_and_one_that_a_kill_cut_short(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsWriter(tmp_path, Trackers([], tmp_path, {}, 2), num_steps=3, log_every=1, start_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


class Recording(GeneralTracker):
    """Stands for wandb, which is not installed for tests."""

    name = "wandb"
    requires_logging_directory = False
    starts: list[dict] = []  # noqa: RUF012
    logged: list[tuple[dict, int]] = []  # noqa: RUF012
    broken = False

    def __init__(self, project: str, **settings: object) -> None:
        super().__init__()
        self.starts.append(settings)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict) -> None:
        self.logged.append((values, 0))

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.logged.append((values, step or 0))


def test_a_restarted_run_continues_the_same_tracked_run_and_survives_its_loss(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recording)
    first = Trackers(["wandb"], tmp_path, {"train.lr": 0.1}, 0)
    first.log({"train/loss": 1.0}, 1)
    again = Trackers(["wandb"], tmp_path, {"train.lr": 0.1}, 1)
    anew = Trackers(["wandb"], tmp_path, {"train.lr": 0.1}, 0)
    ids = [settings["id"] for settings in Recording.starts]
    assert ids[0] == ids[1] != ids[2]
    assert {settings["resume"] for settings in Recording.starts} == {"allow"}
    assert Recording.logged[:2] == [({"train.lr": 0.1}, 0), ({"train/loss": 1.0}, 1)]
    monkeypatch.setattr(Recording, "broken", True)
    again.log({"train/loss": 1.0}, 2)
    again.log({"train/loss": 1.0}, 3)
    assert capsys.readouterr().err.count("wandb is disabled for the rest of this run: no route to host") == 1
    anew.close()


def test_a_tracker_that_is_unknown_or_not_installed_is_refused() -> None:
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"no tensorbord; there are .*tensorboard"):
        check_trackers(["tensorbord"])
    with pytest.raises(UserError, match="aim is not installed here"):
        check_trackers(["aim"])
