"""Batched decoding equals decoding one by one; ends and likelihoods."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model, byte_tokenizer
from transformers import GenerationConfig

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.evaluation.decode import Decoding, decode, end_ids, likeliest_options

LENGTHS = (7, 3, 5, 4)
HAS_IMAGE = (True, False, True, False)


def rows(numbers: list[int]) -> Batch:
    """Prompts of uneven length, padded on the left; every second one has a picture."""
    width = max(LENGTHS[i] for i in numbers)
    input_ids = torch.zeros(len(numbers), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    pixels = torch.zeros(len(numbers), 3, 16, 16)
    for place, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(number)
        length = LENGTHS[number]
        input_ids[place, width - length :] = torch.randint(3, 60, (length,), generator=generator)
        mask[place, width - length :] = 1
        if HAS_IMAGE[number]:
            pixels[place] = torch.randn(3, 16, 16, generator=generator)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        pixel_values=pixels,
        has_image=torch.tensor([HAS_IMAGE[i] for i in numbers]),
    )


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_batched_decoding_equals_one_by_one(fusion: str, num_beams: int) -> None:
    model = build_model(fusion=fusion, trained=True).eval()
    decoding = Decoding(max_new_tokens=6, min_new_tokens=2, num_beams=num_beams)
    tokenizer = byte_tokenizer()
    together = decode(model, rows([0, 1, 2, 3]), tokenizer, decoding)
    alone = [answer for i in range(4) for answer in decode(model, rows([i]), tokenizer, decoding)]
    assert together == alone
    assert len(set(together)) > 1
    batch = rows([0, 2])
    blind = Batch(**(batch.inputs() | {"has_image": torch.zeros(2, dtype=torch.bool)}))
    seen, unseen = (decode(model, each, tokenizer, decoding) for each in (batch, blind))
    assert seen != unseen


def test_an_answer_ends_at_the_decoders_own_end_too() -> None:
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    settings = [GenerationConfig(eos_token_id=ends) for ends in ([5, eos], 7, None)]
    assert end_ids(tokenizer, *settings, None) == [eos, 5, 7]


@pytest.mark.parametrize("place", ["decoder", "merged", "made up"])
def test_tokens_up_to_the_end_are_counted(place: str) -> None:
    model, tokenizer = build_model().eval(), byte_tokenizer()
    model.language_model.generation_config.eos_token_id = 73 if place == "decoder" else None
    model.generation_config.eos_token_id = None if place == "decoder" else 73
    model.generation_config._from_model_config = place == "made up"
    ids = torch.tensor([[70, 71, 0, 0, 0], [70, 0, 0, 0, 0], [70, 71, 72, 73, 74]])
    model.generate = lambda *_, **__: ids  # pyright: ignore[reportAttributeAccessIssue]
    answers = decode(model, rows([0]), tokenizer, Decoding(max_new_tokens=5))
    assert [answer.num_tokens for answer in answers] == [3, 2, 5 if place == "made up" else 4]


def test_the_likeliest_option_is_the_largest_next_logit_among_the_rows_own() -> None:
    model = build_model(trained=True).eval()
    options, counts = [10, 20, 30, 40], [2, 4, 3, 4]
    chosen = likeliest_options(model, rows([0, 1, 2, 3]), options, counts)
    for number, count in enumerate(counts):
        batch = rows([number])
        # Labels at the last position are predicted from the one before: append one to see the next.
        inputs = batch.inputs()
        losses = []
        for option in options[:count]:
            ids = torch.cat([inputs["input_ids"], torch.tensor([[option]])], dim=1)
            labels = torch.full_like(ids, IGNORE_INDEX)
            labels[:, -1] = option
            more = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            losses.append(float(model(**(inputs | more)).loss_sum.detach()))
        assert chosen[number] == losses.index(min(losses))
