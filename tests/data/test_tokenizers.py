"""Prompts and label masks with the tokenizer kinds that decoders come with, down to the single token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.config import ScienceqaConfig
from dehvf_ds.data.collate import Collator, encode, encode_prompt, tokenizer_traits
from dehvf_ds.data.prompts import build_prompt

TOKENIZERS = ["byte_bpe", "byte_bpe_with_bos", "llama", "llama_legacy"]

# Invented.
CAPTION = {"caption": "A child in a\npink dress. 😀"}
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
    "image": "x.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "A pink dog?"},
        {"from": "gpt", "value": "No."},
    ],
}
FORM = ScienceqaConfig(image_captions=True, lecture=True, solution=True)

ROWS = {
    "caption": (CAPTION, "Caption of the picture: A child in a pink dress. 😀{eos}"),
    "scienceqa": (
        PROBLEM,
        "Question: Which is a dog?\nContext: a dog runs\nOptions: (A) the wind (B) Rex\n"
        "Response: The answer is B. BECAUSE: Dogs run. Rex runs.{eos}",
    ),
    "chat": (TALK, "USER: What is it? ASSISTANT: A dog.{eos} USER: A pink dog? ASSISTANT: No.{eos}"),
}
SUPERVISED = {
    "caption": ["A child in a pink dress. 😀{eos}"],
    "scienceqa": ["The answer is B. BECAUSE: Dogs run. Rex runs.{eos}"],
    "chat": ["A dog.{eos}", "No.{eos}"],
}
# One sign a token, X where it is supervised; a begin-of-text token puts one more in front.
MASKS = {
    ("byte_bpe", "caption"): ".....XXXXXXXXXXXXX",
    ("byte_bpe", "scienceqa"): "." * 42 + "XXXXXXXXXXXXXXXXXXXXXXXXXX",
    ("byte_bpe", "chat"): "........................XXXX....................XXXX",
    ("llama", "caption"): "......XXXXXXXXXXXXX",
    ("llama", "scienceqa"): "." * 36 + "XXXXXXXXXXXXXXXXXXXXXXXX",
    ("llama", "chat"): ".........XXXX........XXXX",
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def make_row(tokenizer, transform, task, *, for_generation=False):
    collator = Collator(
        tokenizer, transform, task=task, max_tokens=512, scienceqa=FORM, for_generation=for_generation
    )
    batch = collator([Sample(key="a", image=None, record=ROWS[task][0])])
    return batch.input_ids[0].tolist(), batch.labels[0].tolist()


def mask(labels):
    return "".join("." if label == IGNORE_INDEX else "X" for label in labels)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def runs(labels):
    """Runs of supervised ids."""
    return [
        [labels[i] for i in range(start, stop)]
        for start, stop in zip(_edges(labels, rising=True), _edges(labels, rising=False), strict=True)
    ]


def _edges(labels, *, rising):
    padded = [False, *(label != IGNORE_INDEX for label in labels), False]
    return [i for i in range(len(labels) + 1) if padded[i] != padded[i + 1] and padded[i + 1] == rising]


@pytest.mark.parametrize("task", ROWS)
def test_golden_rows(tokenizer, tiny_transform, task):
    ids, labels = make_row(tokenizer, tiny_transform, task)
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    eos = tokenizer.eos_token
    found = [decode(tokenizer, run).strip() for run in runs(labels)]
    assert found == [text.format(eos=eos) for text in SUPERVISED[task]]
    bos = len(tokenizer_traits(tokenizer).bos)
    assert decode(tokenizer, ids[bos:]) == ROWS[task][1].format(eos=eos)


@pytest.mark.parametrize(("name", "task"), MASKS)
def test_golden_masks(name, task, request, tiny_transform):
    twin = {"byte_bpe": "byte_bpe_with_bos", "llama": "llama_legacy"}[name]
    golden = MASKS[name, task]
    assert mask(make_row(request.getfixturevalue(name), tiny_transform, task)[1]) == golden
    more = "." if twin == "byte_bpe_with_bos" else ""
    assert mask(make_row(request.getfixturevalue(twin), tiny_transform, task)[1]) == more + golden


def test_golden_pieces(byte_bpe, llama, tiny_transform):
    ids, _ = make_row(llama, tiny_transform, "chat")
    assert llama.convert_ids_to_tokens(ids) == [
        *["<s>", "▁USER", ":", "▁What", "▁is", "▁it", "?", "▁ASSISTANT", ":", "▁A", "▁dog", ".", "</s>"],
        *["▁USER", ":", "▁A", "▁pink", "▁dog", "?", "▁ASSISTANT", ":", "▁N", "o", ".", "</s>"],
    ]
    ids, _ = make_row(byte_bpe, tiny_transform, "caption")
    assert byte_bpe.convert_ids_to_tokens(ids) == [
        *["Caption", "Ġof", "Ġthe", "Ġpicture", ":", "ĠA", "Ġchild", "Ġin", "Ġa", "Ġpink", "Ġdress", "."],
        *["Ġ", "ð", "Ł", "ĺ", "Ģ", "<eos>"],
    ]


@pytest.mark.parametrize("task", ROWS)
def test_generation_prompts_are_what_was_trained(tokenizer, tiny_transform, task):
    ids, labels = make_row(tokenizer, tiny_transform, task)
    prompt_ids, _ = make_row(tokenizer, tiny_transform, task, for_generation=True)
    assert ids[: len(prompt_ids)] == prompt_ids
    last_run = len(runs(labels)[-1])
    assert len(prompt_ids) == len(ids) - last_run
    if task != "chat":
        prompt = build_prompt(ROWS[task][0], task, scienceqa=FORM)
        assert encode_prompt(tokenizer, prompt) == prompt_ids == tokenizer(prompt).input_ids


def test_llama_marks(llama, llama_legacy):
    """What transformers makes of a ``tokenizer.model``: bytes for the unseen, a space before a text."""
    for tokenizer in (llama, llama_legacy):
        assert tokenizer_traits(tokenizer).bos == (tokenizer.bos_token_id,)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("The dog\n😀").input_ids)
        assert pieces == ["<s>", "▁The", "▁dog", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
        assert tokenizer("The dog").input_ids == tokenizer(" The dog").input_ids
    # Behind a special token only the old behaviour puts a space.
    assert "▁The" in llama_legacy.convert_ids_to_tokens(llama_legacy("a</s>The").input_ids)
    assert "▁The" not in llama.convert_ids_to_tokens(llama("a</s>The").input_ids)


# "▁" is sentencepiece's sign for a space, and reads as one.
words = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="▁"), min_size=1, max_size=8),
        st.sampled_from(["dog", "42", "7th", "...", "👩‍👩‍👧", "e\u0301", "</s>", "<eos>", "'s", "(A)", "ﬁ"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(text=words.map(" ".join).filter(lambda text: "</s>" not in text))
@pytest.mark.parametrize("name", ["llama", "llama_legacy"])
def test_llama_tokenises_as_sentencepiece_itself(name, request, text):
    tokenizer = request.getfixturevalue(name)
    reference = SentencePieceProcessor(model_file=str(Path(tokenizer.name_or_path) / "tokenizer.model"))
    assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]


@settings(max_examples=60, deadline=None)
@given(prompt=words, target=words)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_target_is_supervised_whole_and_alone(name, request, prompt, target):
    tokenizer = request.getfixturevalue(name)
    prompt, target = " ".join(prompt), " ".join(target)
    ids, labels = encode(tokenizer, prompt, target, 10_000)
    prompt_ids = encode_prompt(tokenizer, prompt)
    assert mask(labels) == "." * len(prompt_ids) + "X" * (len(ids) - len(prompt_ids))
    assert ids[: len(prompt_ids)] == prompt_ids
    assert labels[-1] == tokenizer.eos_token_id
    if tokenizer.eos_token not in prompt + target:
        assert ids[:-1] == tokenizer(f"{prompt} {target}").input_ids
    assert decode(tokenizer, labels[len(prompt_ids) : -1]).removeprefix(" ") == target
