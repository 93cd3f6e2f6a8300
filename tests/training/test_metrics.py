from __future__ import annotations

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dehvf_ds.training.metrics import MetricsWriter, StepMetrics, model_flops


def step(number: int, loss: float) -> StepMetrics:
    return StepMetrics(
        step=number,
        epoch=0.1 * number,
        samples=8 * number,
        tokens=100 * number,
        loss=loss,
        grad_norm=None if loss != loss else 1.0,
        lr=1e-3,
        seconds=2.0,
        data_seconds=0.1,
        samples_per_s=4.0,
        tokens_per_s=50.0,
        mfu=None,
        memory_bytes=1000,
        skipped=0,
        unsupervised_rows=0,
        replaced=0,
        rows_crc=2**24 - 1,
    )


def test_jsonl_and_tensorboard_carry_the_same_numbers(tmp_path, capsys) -> None:
    writer = MetricsWriter(tmp_path, num_steps=3, log_every=1)
    for number, loss in enumerate([2.5, float("nan"), 1.5], start=1):
        writer.write(step(number, loss))
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [2.5, None, 1.5]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")][::2] == [2.5, 1.5]
    assert [e.value for e in events.Scalars("rows_crc")] == [2**24 - 1] * 3
    assert "step 3/3  loss 1.5000" in capsys.readouterr().out


def test_frozen_weights_cost_four_flops_a_parameter_and_token() -> None:
    assert model_flops(13_000_000_000, 1000) == 5.2e13
