"""The arms of the comparison: a YAML file each, with what is trained and how it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from variants import VARIANTS

from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.backbones import build_config, load_model

ARMS = Path(__file__).with_name("arms")
BASES = ("demo_data/backbones/smollm2-135m", "demo_data/backbones/dinov2-small")
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to show pictures to a frozen language model.

    Attributes:
        name: the file's.
        about: one line for the tables.
        model: settings of ``DehvfConfig``; ``lora`` is its rank, ``targets`` its maps.
        start: start values: ``scale_in`` of the queries, ``read_size`` (``scale_out`` times sqrt(M)).
        frozen: parts of names of parameters that stay at their start, and do not count as trained.
        rates: learning rates of the parameters whose names contain these words, as shares of the run's.
        train: settings of ``TrainConfig``, as its weight decay or the rows of a step.
        variants: of ``variants.py``, with their options.
    """

    name: str
    about: str
    model: dict[str, Any]
    start: dict[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_arm(name: str) -> Arm:
    """An arm by its file's name."""
    content = yaml.safe_load((ARMS / f"{name}.yaml").read_text(encoding="utf-8"))
    return Arm(name=name, **content | {"frozen": tuple(content.get("frozen", ()))})


def build(arm: Arm, seed: int) -> DehvfForConditionalGeneration:
    """The arm's model at its start, in bf16."""
    settings = {"num_feature_layers": 6} | arm.model
    rank, targets = settings.pop("lora", 0), settings.pop("targets", ["down_proj"])
    lora = {"rank": rank, "alpha": 2.0 * rank, "dropout": 0.0, "targets": targets} if rank else None
    config = build_config(*BASES, image_size=224, lora=lora, **settings)
    model = load_model(config, *BASES, dtype=DTYPE, seed=seed)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("scale_in") and "scale_in" in arm.start:
            parameter.data.fill_(arm.start["scale_in"])
        if name.endswith("scale_out") and "read_size" in arm.start:
            parameter.data.fill_(arm.start["read_size"] * config.num_slots**-0.5)
    torch.manual_seed(seed)
    for name, options in arm.variants.items():
        VARIANTS[name](model, **options)
    return model


def trained(model: DehvfForConditionalGeneration, arm: Arm) -> dict[str, torch.nn.Parameter]:
    """What the arm trains, by name."""
    every = model.trainable_parameters()
    return {
        name: p
        for name, p in every.items()
        if p.requires_grad and not any(part in name for part in arm.frozen)
    }


def share_of(name: str, arm: Arm) -> float:
    """The share of the run's learning rate that a parameter has."""
    return next((share for part, share in arm.rates.items() if part in name), 1.0)
