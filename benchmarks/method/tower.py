"""A frozen tower's outputs, computed once for all arms and seeds, and a tower that plays them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
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
from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.features import hidden_states

IMAGE_SIZE = 224
BATCH = 16


class States:
    """``[pictures, blocks, tokens, dim]`` in bf16, mapped from a file."""

    def __init__(self, path: Path) -> None:
        self.shape = json.loads(path.with_suffix(".json").read_text())["shape"]
        size = int(torch.tensor(self.shape).prod())
        self._all = torch.from_file(str(path), size=size, dtype=DTYPE).view(self.shape)

    def of(self, rows: Sequence[int], layer: int) -> Tensor:
        """Of these pictures, ``[rows, tokens, dim]``; layer 1 is the first block's output."""
        return torch.stack([self._all[row, layer - 1] for row in rows])


def cached_states(index: ShardIndex, count: int, cache: Path, device: str = "cpu") -> States:
    """The states of the first rows' pictures, or of a blank one; computed if the file has them not."""
    path = cache.with_suffix(".bf16")
    if not path.with_suffix(".json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tower = AutoModel.from_pretrained(BASES[1], dtype=DTYPE).eval().to(device)
        transform, shape = build_image_transform(BASES[1], IMAGE_SIZE), []

        def pixels_of(row: int) -> Tensor:
            image = read_sample(index, row).image
            return transform(image) if image else torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)

        with atomic_file(path) as part, part.open("wb") as file, torch.no_grad():
            pixels = map(pixels_of, range(count))
            while batch := list(islice(pixels, BATCH)):
                shown = torch.stack(batch).to(device, DTYPE)
                states = torch.stack(hidden_states(tower, shown)[1:], dim=1).cpu()
                shape = [count, *states.shape[1:]]
                file.write(states.view(torch.int16).numpy().tobytes())
        path.with_suffix(".json").write_text(json.dumps({"shape": shape}))
    return States(path)


class PlayedTower(nn.Module):
    """Stands in a model's place of the tower: gives the states that were set, whatever the pixels.

    Only of the layers that the model reads; those of others are NaN.
    """

    dtype = DTYPE
    _no_split_modules = ()

    def __init__(self, config: DehvfConfig) -> None:
        super().__init__()
        self.config: PreTrainedConfig = config.vision_config
        self.num_blocks = config.vision_config.num_hidden_layers
        # A prefix is of the last block but one.
        self.layers = {*config.feature_layers, *[self.num_blocks - 1] * (config.fusion == "prefix")}
        self._played: dict[int, Tensor] = {}

    def play(self, states: States, rows: Sequence[int], device: str) -> None:
        """Shows these pictures until others are."""
        self._played = {layer: states.of(rows, layer).to(device) for layer in self.layers}

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        """Hidden states as a tower returns them."""
        like = next(iter(self._played.values()))
        unread = like.new_full((1, 1, 1), torch.nan).expand(like.shape)
        states = (self._played.get(layer, unread) for layer in range(self.num_blocks + 1))
        return SimpleNamespace(hidden_states=tuple(states))
