from __future__ import annotations

import pytest
import torch
from torch import nn

from dehvf_ds.config import TrainConfig
from dehvf_ds.training.engine import GradientWatch, learning_rate, parameter_groups


def test_learning_rate_warms_up_and_ends_at_its_floor() -> None:
    config = TrainConfig(lr=1e-2, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, config, 24) for step in range(24)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[14] == pytest.approx(1e-2 * 0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 1e-3 < rates[-1] < 1.1e-3
    assert learning_rate(0, TrainConfig(lr=1e-2, warmup_steps=0), 10) == pytest.approx(1e-2)


def test_weight_decay_spares_vectors() -> None:
    model = nn.Linear(3, 2)
    groups = parameter_groups(dict(model.named_parameters()), 0.1)
    assert [(g["params"], g["weight_decay"]) for g in groups] == [([model.weight], 0.1), ([model.bias], 0.0)]


def test_gradient_watch_tells_absent_from_zero() -> None:
    used, zero, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    watch = GradientWatch({"used": used, "zero": zero, "unused": unused})
    (used.sum() + 0 * zero.sum()).backward()
    assert watch.finish() == ["unused"]
