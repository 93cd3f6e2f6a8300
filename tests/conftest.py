from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_entries import build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Tiny backbones, scenes in shards, a recipe and a DeepSpeed JSON; tests write into ``runs`` alone."""
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def alone(monkeypatch) -> None:
    """This process is a job of one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name.endswith("SIZE") else "0")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Three rows: a picture, none, a picture; unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 64, (3, 10), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[attention_mask == 0] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "has_image": torch.tensor([True, False, True]),
    }
