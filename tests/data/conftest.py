"""Tiny tokenizers, transforms and shards for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def byte_bpe(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_tokenizer("byte_bpe", tmp_path_factory.mktemp("byte_bpe"))


@pytest.fixture(scope="session")
def byte_bpe_bos(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_tokenizer("byte_bpe_bos", tmp_path_factory.mktemp("byte_bpe_bos"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_tokenizer("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_legacy(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_tokenizer("llama_legacy", tmp_path_factory.mktemp("llama_legacy"))


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
