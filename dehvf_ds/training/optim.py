"""Learning rate, parameter groups, and the check that every trainable gets a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from dehvf_ds.config import TrainConfig


def learning_rate(step: int, config: TrainConfig, num_steps: int) -> float:
    """Learning rate of a step (0 is the first): linear warm-up, then a cosine to ``min_lr_ratio``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """AdamW's groups, made before ZeRO partitions: decay on matrices, none on biases, scales and vectors."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_learning_rate(groups: Iterable[dict], lr: float) -> None:
    """Sets one learning rate in all groups."""
    for group in groups:
        group["lr"] = lr


class GradientWatch:
    """Notes which trainables' gradient hooks fire, to find those that no loss reaches.

    Under ZeRO a trainable without a gradient is stepped with its previous one, silently. A gradient of zero
    is fine; an absent one is a bug in the model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._silent = set(parameters)
        self._handles = [
            parameter.register_hook(lambda _grad, name=name: self._silent.discard(name))
            for name, parameter in parameters.items()
        ]

    def finish(self) -> list[str]:
        """Removes the hooks and returns the names of those that never fired, sorted."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return sorted(self._silent)
