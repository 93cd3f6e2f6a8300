"""Batched decoding equals decoding one by one; ends and likelihoods."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model, byte_tokenizer
from transformers import GenerationConfig

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.evaluation.decode import Decoding, decode, end_ids, likeliest_options

LENGTHS = (7, 3, 5, 4)


def rows(*numbers: int) -> Batch:
    """Left-padded prompts of uneven length; every second one has a picture."""
    width = max(LENGTHS[number] for number in numbers)
    input_ids = torch.zeros(len(numbers), width, dtype=torch.long)
    mask, pixels = torch.zeros_like(input_ids), torch.zeros(len(numbers), 3, 16, 16)
    for place, number in enumerate(numbers):
        generator, start = torch.Generator().manual_seed(number), width - LENGTHS[number]
        input_ids[place, start:] = torch.randint(3, 60, (LENGTHS[number],), generator=generator)
        mask[place, start:] = 1
        if number % 2 == 0:
            pixels[place] = torch.randn(3, 16, 16, generator=generator)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        pixel_values=pixels,
        has_image=torch.tensor([number % 2 == 0 for number in numbers]),
    )


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_batched_decoding_equals_one_by_one(fusion: str, num_beams: int) -> None:
    model, tokenizer = build_model(fusion=fusion, trained=True).eval(), byte_tokenizer()
    decoding = Decoding(max_new_tokens=6, min_new_tokens=2, num_beams=num_beams)
    together = decode(model, rows(0, 1, 2, 3), tokenizer, decoding)
    assert together == [answer for i in range(4) for answer in decode(model, rows(i), tokenizer, decoding)]
    assert len(set(together)) > 1
    batch = rows(0, 2)
    blind = Batch(**(batch.inputs() | {"has_image": torch.zeros(2, dtype=torch.bool)}))
    assert decode(model, batch, tokenizer, decoding) != decode(model, blind, tokenizer, decoding)


@pytest.mark.parametrize("place", ["decoder", "merged", "made up"])
def test_tokens_up_to_the_end_are_counted(place: str) -> None:
    model, tokenizer = build_model().eval(), byte_tokenizer()
    settings = [GenerationConfig(eos_token_id=ends) for ends in ([5, tokenizer.eos_token_id], 7, None)]
    assert end_ids(tokenizer, *settings, None) == [tokenizer.eos_token_id, 5, 7]
    model.language_model.generation_config.eos_token_id = 73 if place == "decoder" else None
    model.generation_config.eos_token_id = None if place == "decoder" else 73
    model.generation_config._from_model_config = place == "made up"
    ids = torch.tensor([[70, 71, 0, 0, 0], [70, 0, 0, 0, 0], [70, 71, 72, 73, 74]])
    model.generate = lambda *_, **__: ids  # pyright: ignore[reportAttributeAccessIssue]
    answers = decode(model, rows(0), tokenizer, Decoding(max_new_tokens=5))
    assert [answer.num_tokens for answer in answers] == [3, 2, 5 if place == "made up" else 4]


def test_the_likeliest_option_is_the_largest_next_logit_among_the_rows_own() -> None:
    model = build_model(trained=True).eval()
    options, counts = [10, 20, 30, 40], [2, 4, 3, 4]
    chosen = likeliest_options(model, rows(0, 1, 2, 3), options, counts)
    for number, count in enumerate(counts):
        inputs, losses = rows(number).inputs(), []
        for option in options[:count]:
            ids = torch.cat([inputs["input_ids"], torch.tensor([[option]])], dim=1)
            labels = torch.full_like(ids, IGNORE_INDEX)
            labels[:, -1] = option
            more = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            losses.append(float(model(**(inputs | more)).loss_sum.detach()))
        assert chosen[number] == losses.index(min(losses))
