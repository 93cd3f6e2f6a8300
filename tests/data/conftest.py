"""Tiny tokenizers, transforms and shards for the tests of the data package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from tiny_shards import caption_row, write_shards
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dehvf_ds.data.index import ShardIndex

CORPUS = [
    "Caption of the picture: The dog runs. A child in a pink dress.",
    "Response: The answer is A. The answer is B. a b Question: Context: N/A Options: (A) (B)",
] * 4


class TinyTransform:
    """A stand-in for a tower's transform: the picture's mean colour, 4 x 4."""

    image_size = 4

    def __call__(self, image: Image.Image) -> torch.Tensor:
        small = image.resize((1, 1))
        colour = torch.tensor(small.getpixel((0, 0))) / 255
        return colour[:, None, None].expand(3, 4, 4).clone()


def build_byte_bpe(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if add_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def build_sentencepiece_like() -> PreTrainedTokenizerFast:
    """As LLaMA's: a space is put before every text, even before one that begins with a space."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def build_llama(directory: Path, *, legacy: bool) -> PreTrainedTokenizerBase:
    """LLaMA's kind: a sentencepiece BPE with byte fallback, read from ``tokenizer.model`` as a 7B's is."""
    SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, "USER: What is it? ASSISTANT: A dog. The wind pushes the kite."]),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        **{"add_bos_token": True, "add_eos_token": False, "legacy": legacy},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def byte_bpe() -> PreTrainedTokenizerFast:
    return build_byte_bpe()


@pytest.fixture(scope="session")
def byte_bpe_with_bos() -> PreTrainedTokenizerFast:
    return build_byte_bpe(add_bos=True)


@pytest.fixture(scope="session")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    return build_sentencepiece_like()


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_llama(tmp_path_factory.mktemp("llama"), legacy=False)


@pytest.fixture(scope="session")
def llama_legacy(tmp_path_factory) -> PreTrainedTokenizerBase:
    return build_llama(tmp_path_factory.mktemp("llama_legacy"), legacy=True)


@pytest.fixture(scope="session")
def tiny_transform() -> TinyTransform:
    return TinyTransform()


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    def make(num_rows: int = 10, samples_per_shard: int = 4, captions: int = 2) -> Path:
        output = tmp_path / "shards"
        rows = (caption_row(i, captions=captions) for i in range(num_rows))
        write_shards(rows, output, name="tiny", samples_per_shard=samples_per_shard, builder={"test": True})
        ShardIndex(output).close()
        return output

    return make
