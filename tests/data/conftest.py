"""Tiny tokenizers, transforms and shards for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_shards import caption_row, write_shards
from tiny_tokenizers import build_tokenizer
from transformers import PreTrainedTokenizerBase


class TinyTransform:
    """In place of a tower's transform: the picture's mean colour, 4 x 4."""

    image_size = 4

    def __call__(self, image: Image.Image) -> torch.Tensor:
        small = image.resize((1, 1))
        colour = torch.tensor(small.getpixel((0, 0))) / 255
        return colour[:, None, None].expand(3, 4, 4).clone()


def tokenizer_fixture(kind: str) -> Any:
    @pytest.fixture(scope="session", name=kind)
    def build(tmp_path_factory) -> PreTrainedTokenizerBase:
        return build_tokenizer(kind, tmp_path_factory.mktemp(kind))

    return build


KINDS = ("byte_bpe", "byte_bpe_bos", "llama", "llama_legacy")
byte_bpe, byte_bpe_bos, llama, llama_legacy = map(tokenizer_fixture, KINDS)


@pytest.fixture(scope="session")
def tiny_transform() -> TinyTransform:
    return TinyTransform()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    def make(num_rows: int = 10, samples_per_shard: int = 4) -> Path:
        output = tmp_path / "shards"
        rows = (caption_row(i) for i in range(num_rows))
        write_shards(rows, output, name="tiny", samples_per_shard=samples_per_shard, builder={"test": True})
        return output

    return make
