from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.config import UserError
from dehvf_ds.data.collate import (
    Collator,
    encode,
    encode_prompt,
    tokenizer_traits,
)

PROMPT, TARGET = "Caption of the picture:", "The dog runs."


@pytest.fixture(params=["byte_bpe", "byte_bpe_with_bos", "sentencepiece_like"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def row(key="a", caption=TARGET, image=True):
    picture = Image.new("RGB", (5, 5), (255, 0, 0)) if image else None
    return Sample(key=key, image=picture, record={"caption": caption})


def test_traits_are_found_by_behaviour(byte_bpe, byte_bpe_with_bos, sentencepiece_like):
    assert (tokenizer_traits(byte_bpe).bos, tokenizer_traits(byte_bpe).seam) == ((), " ")
    assert (tokenizer_traits(byte_bpe_with_bos).bos, tokenizer_traits(byte_bpe_with_bos).seam) == ((0,), " ")
    assert (tokenizer_traits(sentencepiece_like).bos, tokenizer_traits(sentencepiece_like).seam) == ((1,), "")
    assert tokenizer_traits(byte_bpe).pad_id == byte_bpe.eos_token_id
    assert tokenizer_traits(sentencepiece_like).pad_id == sentencepiece_like.pad_token_id


def test_seam_equals_the_whole_text(tokenizer):
    ids, labels = encode(tokenizer, PROMPT, TARGET, 64)
    assert ids == [*tokenizer(f"{PROMPT} {TARGET}").input_ids, tokenizer.eos_token_id]
    supervised = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    assert supervised == list(range(len(tokenizer(PROMPT).input_ids), len(ids)))
    assert all(labels[i] == ids[i] for i in supervised)
    assert tokenizer.decode([ids[i] for i in supervised[:-1]]).strip() == TARGET


def test_golden_tokens(byte_bpe, sentencepiece_like):
    ids, labels = encode(byte_bpe, "a", "The answer is A.", 64)
    assert byte_bpe.convert_ids_to_tokens(ids) == ["a", "ĠThe", "Ġanswer", "Ġis", "ĠA", ".", "<eos>"]
    assert labels == [IGNORE_INDEX, *ids[1:]]
    ids, labels = encode(sentencepiece_like, "a", "The answer is A.", 64)
    assert sentencepiece_like.convert_ids_to_tokens(ids) == [
        *["<s>", "▁a", "▁The", "▁answer", "▁is", "▁A.", "</s>"]
    ]
    assert labels == [IGNORE_INDEX, IGNORE_INDEX, *ids[2:]]


def test_long_target_loses_its_end_and_eos(tokenizer):
    ids, labels = encode(tokenizer, PROMPT, TARGET, 64)
    for size in range(len(tokenizer(PROMPT).input_ids) + 1, len(ids)):
        cut_ids, cut_labels = encode(tokenizer, PROMPT, TARGET, size)
        assert (cut_ids, cut_labels) == (ids[:size], labels[:size])
        assert tokenizer.eos_token_id not in cut_ids
    assert encode(tokenizer, PROMPT, TARGET, len(ids)) == (ids, labels)


def test_special_tokens_in_a_target_are_plain_text(byte_bpe):
    ids, _ = encode(byte_bpe, PROMPT, "a <eos> b", 64)
    assert ids.count(byte_bpe.eos_token_id) == 1


def test_empty_prompt_supervises_all_that_can_be_predicted(byte_bpe, byte_bpe_with_bos):
    ids, labels = encode(byte_bpe, "", TARGET, 64)
    assert ids == [*byte_bpe(TARGET).input_ids, byte_bpe.eos_token_id]
    assert labels == [IGNORE_INDEX, *ids[1:]]
    ids, labels = encode(byte_bpe_with_bos, "", TARGET, 64)
    assert labels == [IGNORE_INDEX, *ids[1:]]


def test_generation_begins_as_training_does(tokenizer):
    ids, _ = encode(tokenizer, "Response:", "The answer is A.", 64)
    start = encode_prompt(tokenizer, "Response:", "The answer is")
    assert ids[: len(start)] == start
    assert encode_prompt(tokenizer, "Response:") == tokenizer("Response:").input_ids


def test_training_batch(byte_bpe, tiny_transform):
    collator = Collator(byte_bpe, tiny_transform, task="caption", max_tokens=64, prompt="a")
    batch = collator([row("x"), row("y", "The dog", image=False)])
    long, short = encode(byte_bpe, "a", TARGET, 64), encode(byte_bpe, "a", "The dog", 64)
    gap = len(long[0]) - len(short[0])
    assert gap > 0
    assert batch.input_ids.tolist() == [long[0], short[0] + [byte_bpe.eos_token_id] * gap]
    assert batch.labels.tolist() == [long[1], short[1] + [IGNORE_INDEX] * gap]
    assert batch.attention_mask.sum(1).tolist() == [len(long[0]), len(short[0])]
    assert batch.attention_mask[1].tolist() == [1] * len(short[0]) + [0] * gap
    assert batch.keys == ("x", "y")
    assert batch.has_image.tolist() == [True, False]
    assert batch.has_image.dtype == torch.bool
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.pixel_values.shape == (2, 3, 4, 4)
    assert batch.pixel_values[:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_generation_batch(byte_bpe_with_bos, tiny_transform):
    tokenizer = byte_bpe_with_bos
    problem = {"question": "a", "choices": ["b", "a"], "answer": 0}
    rows = [
        Sample(key=str(i), image=None, record={**problem, "hint": hint})
        for i, hint in enumerate(["", "a b a b"])
    ]
    collator = Collator(
        tokenizer,
        tiny_transform,
        task="scienceqa",
        max_tokens=8,
        for_generation=True,
        answer_prefix="The answer is",
    )
    batch = collator(rows)
    assert (batch.labels == IGNORE_INDEX).all()
    assert batch.attention_mask[:, -1].tolist() == [1, 1]
    assert batch.attention_mask.sum(1).unique().numel() == 2
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        kept = ids[mask.bool()]
        assert kept[0] == tokenizer.bos_token_id
        assert tokenizer.decode(kept).endswith("Response: The answer is")
        assert (ids[~mask.bool()] == tokenizer.eos_token_id).all()


def test_rows_without_supervision_are_counted_not_dropped(byte_bpe, tiny_transform):
    collator = Collator(byte_bpe, tiny_transform, task="caption", max_tokens=8, prompt="Caption of " * 8)
    batch = collator([row(), row()])
    assert batch.input_ids.shape == (2, 8)
    assert batch.num_unsupervised_rows() == 2
    whole = Collator(byte_bpe, tiny_transform, task="caption", max_tokens=64)([row()])
    assert whole.num_unsupervised_rows() == 0


def test_long_text_prints_nothing(byte_bpe, caplog):
    byte_bpe.model_max_length = 4
    try:
        with caplog.at_level(logging.WARNING):
            encode(byte_bpe, PROMPT, TARGET, 8)
    finally:
        byte_bpe.model_max_length = int(1e30)
    assert caplog.records == []


def test_tokenizer_without_eos(byte_bpe):
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_bpe.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token; set eos_token"):
        tokenizer_traits(bare)
