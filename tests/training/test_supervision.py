"""Rows that have nothing to learn are refused, or counted and told; no loss is ever made of nothing."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_entries import arguments

from dehvf_ds import train
from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, UnsupervisedError
from dehvf_ds.distributed import World
from dehvf_ds.training.checkpoint import Progress
from dehvf_ds.training.dry_run import check_supervised
from dehvf_ds.training.metrics import Evaluated
from dehvf_ds.training.step import StopRequest, train_step, validation_loss
from dehvf_ds.training.trainer import Trainer

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def batch(*prompts: int, width: int = 6) -> Batch:
    """A row for each length of a prompt; what is left of ``width`` is to be learnt."""
    labels = torch.ones(len(prompts), width, dtype=torch.long)
    for row, length in enumerate(prompts):
        labels[row, :length] = IGNORE_INDEX
    return Batch(
        input_ids=torch.ones_like(labels),
        attention_mask=torch.ones_like(labels),
        labels=labels,
        pixel_values=torch.zeros(len(prompts), 3, 2, 2),
        has_image=torch.ones(len(prompts), dtype=torch.bool),
        keys=tuple(f"row{row}" for row in range(len(prompts))),
    )


def checked(*batches: Batch) -> str | None:
    return check_supervised(batches, ALONE, DataConfig(train="shards", max_tokens=8))


def test_a_few_rows_without_are_reported_and_many_are_refused() -> None:
    assert checked(batch(1, 5), batch(0, 2)) is None
    assert checked(batch(1, 2, 3, 4), batch(1, 6, 3, 4)) == (
        "shards: 1 of the first 8 rows have no token to learn, row1 the first: their prompts fill all "
        "data.max_tokens 8; raise it"
    )
    with pytest.raises(UnsupervisedError, match="3 of the first 8 rows"):
        checked(batch(1, 2, 3, 4), batch(1, 6, 6, 6))
    # All of one micro-batch, though few of all rows.
    with pytest.raises(UnsupervisedError, match="4 of the first 20 rows"):
        checked(batch(6, 6, 6, 6), *[batch(1, 2, 3, 4)] * 4)


class Engine(torch.nn.Module):
    """Its loss is the sum of the labels; the second batch brings the request to stop."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self.calls, self.stop = 0, stop

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        self.stop.requested = self.calls == 2
        return SimpleNamespace(loss_sum=inputs["labels"].float().sum())


def test_a_step_of_nothing_is_refused_before_any_backward() -> None:
    engine = Engine(StopRequest())
    with pytest.raises(
        UnsupervisedError, match=r"step 7: none of its 4 rows has a token to learn; .*max_tokens"
    ):
        train_step(engine, [batch(6, 6), batch(6, 6)], ALONE, torch.float32, seed=0, step=7)
    # It has no backward and no step to call.
    assert engine.calls == 1


def test_a_validation_loss_is_never_made_of_nothing_and_a_request_to_stop_ends_it() -> None:
    for batches in ([batch(6, 6)], []):
        with pytest.raises(UnsupervisedError, match=r"no row of data\.val has a token to learn"):
            validation_loss(Engine(StopRequest()), batches, ALONE, torch.float32, StopRequest())
    engine = Engine(stop := StopRequest())
    rows = batch(0, 0, width=3)
    assert validation_loss(engine, [rows], ALONE, torch.float32, stop) == 6 / 4
    engine.calls = 0
    assert validation_loss(engine, [rows] * 5, ALONE, torch.float32, stop) is None
    assert engine.calls == 2
    assert engine.training


def trainer(**progress: int) -> Trainer:
    """One that has set up nothing."""
    config = RunConfig(
        run_dir="nowhere", model=ModelConfig(language_model="l", vision_tower="v"), data=DataConfig(train="t")
    )
    run = SimpleNamespace(config=config, world=ALONE, ds_config={})
    made = Trainer(run)  # pyright: ignore[reportArgumentType]
    made.progress = Progress(**progress)
    return made


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_never_the_best(value: float, monkeypatch) -> None:
    made = trainer(step=3)
    made.engine = made.model = made.validation_batches = SimpleNamespace()
    monkeypatch.setattr("dehvf_ds.training.trainer.validation_loss", lambda *_: value)
    assert "val/loss" in made.validate()
    made.evaluate(lambda *_: Evaluated(score=value, numbers={}, sheet=Path()))
    progress = made.progress
    assert (progress.best_loss, progress.best_score, progress.best_step) == (None, None, None)


def test_a_run_warns_once_above_a_share(capsys) -> None:
    trainer(samples=5000, unsupervised_rows=50)._warn_of_unsupervised(True)
    made = trainer(samples=64, unsupervised_rows=2)
    made._warn_of_unsupervised(False)
    assert capsys.readouterr().err == ""
    made._warn_of_unsupervised(True)
    made._warn_of_unsupervised(True)
    assert capsys.readouterr().err.count("warning: 2 of 64 rows had no token to learn") == 1


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_run_whose_prompts_fill_the_rows_stops_before_it_writes_a_loss(world, alone, more) -> None:
    message = "8 of the first 8 rows have no token" if more else "step 1: none of its 8 rows has a token"
    given = arguments(world, "nothing", "--data.max_tokens", "8", "--data.num_workers", "0", *more)
    with pytest.raises(UnsupervisedError, match=message):
        train.main(given)
    run = world / "runs/nothing"
    assert not more or not run.exists()
    assert not (run / "adapter").exists()
    assert more or (run / "metrics.jsonl").read_text() == ""
