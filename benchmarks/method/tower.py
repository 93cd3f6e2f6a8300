"""A frozen tower's outputs, computed once for all arms and seeds, and a tower that plays them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from arms import BASES, DTYPE
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from dehvf_ds.atomic import atomic_file
from dehvf_ds.data.collate import build_image_transform
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.model.features import hidden_states

IMAGE_SIZE = 224
BATCH = 16


class States:
    """``[pictures, blocks, tokens, dim]`` in bf16, mapped from a file."""

    def __init__(self, path: Path) -> None:
        self.shape = json.loads(path.with_suffix(".json").read_text())["shape"]
        size = int(torch.tensor(self.shape).prod())
        self._all = torch.from_file(str(path), size=size, dtype=DTYPE).view(self.shape)

    def of(self, rows: Sequence[int]) -> Tensor:
        """Of these pictures."""
        return torch.stack([self._all[row] for row in rows])


def cached_states(index: ShardIndex, count: int, cache: Path) -> States:
    """The states of the first rows' pictures, or of a blank one; computed if the file has them not."""
    path = cache.with_suffix(".bf16")
    if not path.with_suffix(".json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tower = AutoModel.from_pretrained(BASES[1], dtype=DTYPE).eval()
        transform, rows, shape = (
            build_image_transform(BASES[1], IMAGE_SIZE),
            range(count),
            [],
        )
        with atomic_file(path) as part, part.open("wb") as file, torch.no_grad():
            for first in range(0, len(rows), BATCH):
                images = [read_sample(index, row).image for row in rows[first : first + BATCH]]
                blank = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
                pixels = torch.stack([transform(image) if image else blank for image in images])
                states = torch.stack(hidden_states(tower, pixels.to(DTYPE))[1:], dim=1).contiguous()
                shape = [len(rows), *states.shape[1:]]
                file.write(states.view(torch.int16).numpy().tobytes())
        path.with_suffix(".json").write_text(json.dumps({"shape": shape}))
    return States(path)


class PlayedTower(nn.Module):
    """Stands in a model's place of the tower: gives the states that were set, whatever the pixels."""

    dtype = DTYPE
    _no_split_modules = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.states: Tensor | None = None

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        """Hidden states as a tower returns them; those before the first block are the first block's."""
        assert self.states is not None
        blocks = self.states.unbind(dim=1)
        return SimpleNamespace(hidden_states=(blocks[0], *blocks))
