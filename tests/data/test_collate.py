from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.chat import encode_chat, encode_chat_prompt, parse_conversation
from dehvf_ds.data.collate import (
    Collator,
    encode,
    encode_prompt,
    tokenizer_traits,
)

PROMPT, TARGET = "Caption of the picture:", "The dog runs."
PROBLEM = {
    "question": "a",
    "choices": ["b", "a"],
    "answer": 0,
    "image_caption": "a dog",
    "lecture": "The dog runs.",
    "solution": "A child.",
}
TALK = {
    "conversations": [
        {"from": "human", "value": "<image>\nThe dog?"},
        {"from": "gpt", "value": "A child."},
        {"from": "human", "value": "A dress?"},
        {"from": "gpt", "value": "The dog runs."},
    ]
}


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
    # An end of text stands for the begin that the tokenizer has not: generation must begin from something.
    eos = byte_bpe.eos_token_id
    for prompt in ("", " ", "\n"):
        ids, labels = encode(byte_bpe, prompt, TARGET, 64)
        assert ids == [eos, *byte_bpe(TARGET).input_ids, eos]
        assert labels == [IGNORE_INDEX, *ids[1:]]
        assert encode_prompt(byte_bpe, prompt) == [eos]
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
    rows = [
        Sample(key=str(i), image=None, record={**PROBLEM, "hint": hint})
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


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (None, "Context: N/A\nOptions: (A) b (B) a\nResponse: The answer is A."),
        (
            ScienceqaConfig(image_captions=True),
            "Context: a dog\nOptions: (A) b (B) a\nResponse: The answer is A.",
        ),
        (
            ScienceqaConfig(lecture=True, solution=True),
            "Context: N/A\nOptions: (A) b (B) a\nResponse: The answer is A. BECAUSE: The dog runs. A child.",
        ),
    ],
)
def test_scienceqa_form(byte_bpe, tiny_transform, form, text):
    """The picture's caption is shown to the model only where the configuration says so."""
    settings = {} if form is None else {"scienceqa": form}
    collator = Collator(byte_bpe, tiny_transform, task="scienceqa", max_tokens=512, **settings)
    batch = collator([Sample(key="a", image=None, record=PROBLEM)])
    assert byte_bpe.decode(batch.input_ids[0]) == f"Question: a\n{text}<eos>"


def test_chat_batches(tokenizer, tiny_transform):
    samples = [Sample(key="a", image=None, record=TALK), row("b")]
    samples[1].record.update(TALK, conversations=TALK["conversations"][:2])
    messages = parse_conversation(TALK)
    batch = Collator(tokenizer, tiny_transform, task="chat", max_tokens=512)(samples)
    whole, short = encode_chat(tokenizer, messages, 512), encode_chat(tokenizer, messages[:2], 512)
    assert (batch.input_ids[0].tolist(), batch.labels[0].tolist()) == whole
    assert batch.labels[1].tolist() == short[1] + [IGNORE_INDEX] * (len(whole[1]) - len(short[1]))
    assert batch.has_image.tolist() == [False, True]
    batch = Collator(tokenizer, tiny_transform, task="chat", max_tokens=8, for_generation=True)(samples)
    assert batch.input_ids[0].tolist() == encode_chat_prompt(tokenizer, messages)
    question = encode_chat_prompt(tokenizer, messages[:1])
    assert batch.input_ids[1].tolist()[-len(question) :] == question
    assert (batch.labels == IGNORE_INDEX).all()


def test_damaged_conversation_names_its_sample(byte_bpe, tiny_transform):
    collator = Collator(byte_bpe, tiny_transform, task="chat", max_tokens=64)
    with pytest.raises(UserError, match=r"^sample x7: the conversation has no turns"):
        collator([Sample(key="x7", image=None, record={})])


def test_augmented_in_training_only(byte_bpe, tiny_transform):
    def to_green(image, sample):
        assert (image.getpixel((0, 0)), sample.epoch) == ((255, 0, 0), 3)
        return Image.new("RGB", image.size, (0, 255, 0))

    samples = [replace(row("a"), epoch=3), replace(row("b", image=False), epoch=3)]
    for for_generation, colour in ((False, [0.0, 1.0, 0.0]), (True, [1.0, 0.0, 0.0])):
        collator = Collator(
            byte_bpe,
            tiny_transform,
            task="caption",
            max_tokens=64,
            augment=to_green,
            for_generation=for_generation,
        )
        pixels = collator(samples).pixel_values
        assert pixels[:, :, 0, 0].tolist() == [colour, [0.0, 0.0, 0.0]]


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
