"""Rows, label masks and pixels with the tokenizers and image processors that backbones come with."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.collate import (
    Collator,
    build_image_transform,
    check_tokenizer,
    encode,
    encode_prompt,
    letter_ids,
    load_tokenizer,
)
from dehvf_ds.data.prompts import parse_conversation
from dehvf_ds.model.processing import tokenizer_traits

TOKENIZERS = ["byte_bpe", "byte_bpe_bos", "llama", "llama_legacy"]
TARGET = "The dog runs."

# Invented.
PROBLEM = {
    "question": "Which is a dog?",
    "choices": ["the wind", "Rex"],
    "answer": 1,
    "hint": "",
    "image_caption": "a dog runs",
    "lecture": "Dogs run.",
    "solution": "Rex runs.",
}
TALK = {
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "A pink dog?"},
        {"from": "gpt", "value": "No."},
    ],
}
RECORDS = {"caption": {"caption": "A child in a\npink dress. 😀"}, "scienceqa": PROBLEM, "chat": TALK}
# What is read, with the supervised parts in brackets.
ROWS = {
    "caption": "Caption of the picture: [A child in a pink dress. 😀{eos}]",
    "scienceqa": "Question: Which is a dog?\nContext: a dog runs\nOptions: (A) the wind (B) Rex\n"
    "Response: [The answer is B. BECAUSE: Dogs run. Rex runs.{eos}]",
    "chat": "USER: What is it? ASSISTANT: [A dog.{eos}] USER: A pink dog? ASSISTANT: [No.{eos}]",
}
FORM = ScienceqaConfig(image_captions=True, lecture=True, solution=True)


@pytest.fixture
def collator(byte_bpe, tiny_transform):
    return Collator(byte_bpe, tiny_transform, task="caption", max_tokens=64)


def sample(key="a", caption=TARGET, image=True):
    picture = Image.new("RGB", (5, 5), (255, 0, 0)) if image else None
    return Sample(key=key, image=picture, record={"caption": caption}, epoch=3)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_golden_rows(name, request, tiny_transform, task):
    tokenizer = request.getfixturevalue(name)
    collator = Collator(tokenizer, tiny_transform, task=task, max_tokens=512, scienceqa=FORM)
    row = Sample(key="a", image=None, record=RECORDS[task])
    batch = collator([row])
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    golden = ROWS[task].format(eos=tokenizer.eos_token)
    bos = len(tokenizer_traits(tokenizer).bos)
    assert decode(tokenizer, ids[bos:]) == golden.replace("[", "").replace("]", "")
    runs = [list(run) for learnt, run in groupby(labels, lambda label: label != IGNORE_INDEX) if learnt]
    learnt = [part.partition("]")[0] for part in golden.split("[")[1:]]
    assert [decode(tokenizer, run).strip() for run in runs] == learnt
    # Generation begins where the last answer does.
    asked = replace(collator, for_generation=True)([row])
    assert asked.input_ids[0].tolist() == ids[: -len(runs[-1])]
    assert (asked.labels == IGNORE_INDEX).all()


# "▁" is sentencepiece's sign for a space, and reads as one.
words = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="▁"), min_size=1, max_size=8),
        st.sampled_from(["dog", "42", "7th", "...", "👩‍👩‍👧", "e\u0301", "</s>", "'s", "(A)", "ﬁ"]),
    ),
    min_size=1,
    max_size=6,
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(prompt=words, target=words, size=st.integers(1, 40))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_target_is_supervised_whole_and_alone(name, request, prompt, target, size):
    tokenizer = request.getfixturevalue(name)
    ids, labels = encode(tokenizer, prompt, target, 10_000)
    head = encode_prompt(tokenizer, prompt)
    assert ids[: len(head)] == head
    assert labels == [IGNORE_INDEX] * len(head) + ids[len(head) :]
    assert labels[-1] == tokenizer.eos_token_id
    if tokenizer.eos_token not in prompt + target:
        assert ids[:-1] == tokenizer(f"{prompt} {target}").input_ids
    assert decode(tokenizer, labels[len(head) : -1]).removeprefix(" ") == target
    assert encode(tokenizer, prompt, target, size) == (ids[:size], labels[:size])


def test_letters_that_are_no_tokens_of_their_own_are_refused(byte_bpe):
    with pytest.raises(UserError, match="a letter after the prompt is not one token of its own"):
        letter_ids(byte_bpe)


def test_training_batch(collator, byte_bpe):
    samples = [sample("x"), sample("y", "The dog", image=False)]
    batch = replace(collator, prompt="a")(samples)
    long, short = encode(byte_bpe, "a", TARGET, 64), encode(byte_bpe, "a", "The dog", 64)
    gap = len(long[0]) - len(short[0])
    assert gap > 0
    assert batch.input_ids.tolist() == [long[0], short[0] + [byte_bpe.eos_token_id] * gap]
    assert batch.labels.tolist() == [long[1], short[1] + [IGNORE_INDEX] * gap]
    assert batch.attention_mask.tolist() == [[1] * len(long[0]), [1] * len(short[0]) + [0] * gap]
    assert batch.keys == ("x", "y")
    assert batch.has_image.tolist() == [True, False]
    assert batch.pixel_values[:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0]]
    blind = collator(samples[1:])
    assert (blind.pixel_values.shape, blind.pixel_values.count_nonzero()) == (batch.pixel_values.shape, 0)
    assert replace(collator, prompt="Caption of " * 40)(samples).num_unsupervised_rows() == 2


def test_generation_batch_is_padded_on_the_left_and_never_cut(byte_bpe_bos, tiny_transform):
    rows = [Sample(key=hint, image=None, record={**PROBLEM, "hint": hint}) for hint in ("", "a b a b")]
    form = {"task": "scienceqa", "max_tokens": 8, "for_generation": True}
    batch = Collator(byte_bpe_bos, tiny_transform, **form, answer_prefix="The answer is")(rows)
    assert batch.attention_mask[:, -1].tolist() == [1, 1]
    assert batch.attention_mask.sum(1).unique().numel() == 2
    for ids, kept in zip(batch.input_ids, batch.attention_mask.bool(), strict=True):
        assert ids[kept][0] == byte_bpe_bos.bos_token_id
        assert byte_bpe_bos.decode(ids[kept]).endswith("Response: The answer is")
        assert (ids[~kept] == byte_bpe_bos.eos_token_id).all()


def test_a_chat_is_taken_as_it_was_parsed_or_parsed_here(collator):
    collator = replace(collator, task="chat", max_tokens=512)
    chat = Sample(key="x7", image=None, record=TALK)
    parsed = replace(chat, record={}, messages=parse_conversation(TALK))
    assert torch.equal(*(collator([each]).labels for each in (chat, parsed)))
    with pytest.raises(UserError, match=r"^sample x7: the conversation has no turns"):
        collator([replace(chat, record={})])


def test_augmented_in_training_only(collator):
    def to_green(image, sample):
        assert (image.getpixel((0, 0)), sample.epoch) == ((255, 0, 0), 3)
        return Image.new("RGB", image.size, (0, 255, 0))

    for for_generation, colour in ((False, [0.0, 1.0, 0.0]), (True, [1.0, 0.0, 0.0])):
        batch = replace(collator, augment=to_green, for_generation=for_generation)([sample("a")])
        assert batch.pixel_values[:, :, 0, 0].tolist() == [colour]


@pytest.mark.parametrize("augmented", [False, True])
def test_a_picture_that_rows_share_is_transformed_once(collator, augmented):
    """Rows share it by the object; if views are random, also by what these are drawn for."""
    one, other = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (255, 0, 0))
    rows = [(one, 0), (other, 5), (one, 0), (None, 0), (one, 1)]
    samples = [replace(sample("a"), image=image, example=number) for image, number in rows]
    drawn_for = []

    def view(image, sample):
        drawn_for.append(sample.example)
        return image

    batch = replace(collator, augment=view if augmented else None)(samples)
    assert drawn_for == ([0, 5, 1] if augmented else [])
    assert batch.picture.tolist() == [0, 1, 0, 0, 2 if augmented else 0]
    assert batch.has_image.tolist() == [True, True, True, False, True]
    assert len(batch.pixel_values) == (3 if augmented else 2)
    # Rows with pictures of their own are numbered by none.
    assert collator(samples[:2]).picture is None


def test_tokenizers_that_cannot_be_used(byte_bpe, tmp_path, caplog):
    with pytest.raises(UserError, match=f"no tokenizer at {tmp_path}: "):
        load_tokenizer(str(tmp_path))
    byte_bpe.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    check_tokenizer(tokenizer, len(tokenizer) + 100)
    for num_embeddings, message in ((100, "has id .* has 100 embeddings"), (1000, "knows .* has 1000 emb")):
        with pytest.raises(UserError, match=message):
            check_tokenizer(tokenizer, num_embeddings)
    # A text beyond the tokenizer's own limit prints no warning.
    tokenizer.model_max_length = 4
    with caplog.at_level(logging.WARNING):
        encode(tokenizer, "Caption of the picture:", TARGET, 8)
    assert caplog.records == []


DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture
def tower(tmp_path):
    def make(config):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_tower_of_dinov2(tower):
    assert build_image_transform(tower(DINOV2), None).image_size == 224
    pixels = build_image_transform(tower(DINOV2), 98)(Image.new("RGB", (50, 30), (255, 0, 128)))
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (3, 98, 98))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    image = Image.new("RGB", (60, 20), (255, 255, 255))
    image.paste((0, 0, 0), (20, 0, 40, 20))
    assert build_image_transform(tower(DINOV2), 20)(image).max() < 0  # the middle third and nothing else


@pytest.mark.parametrize("kind", ["CLIPImageProcessorFast", "SiglipImageProcessor"])
@pytest.mark.parametrize("size", [None, 32])
def test_other_towers(tower, kind, size):
    transform = build_image_transform(tower({"image_processor_type": kind}), size)
    assert transform(Image.new("RGB", (50, 30))).shape == (3, size or 224, size or 224)


def test_towers_that_cannot_be_used(tower, tmp_path):
    with pytest.raises(UserError, match=r"no preprocessor_config.json; copy it"):
        build_image_transform(tmp_path, 224)
    with pytest.raises(UserError, match="no usable image processor"):
        build_image_transform(tower({"image_processor_type": "NoSuchProcessor"}), 224)
    config = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    with pytest.raises(UserError, match=r"not one square; set model\.image_size"):
        build_image_transform(tower(config), None)
    assert build_image_transform(tower(config), 32).image_size == 32
