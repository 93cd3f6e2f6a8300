"""Batched generation and likelihood with a whole model on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Batch
from dehvf_ds.model import DehvfForConditionalGeneration


@torch.inference_mode()
def greedy_answers(
    model: DehvfForConditionalGeneration,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> Iterator[tuple[str, str]]:
    """Decodes greedily; yields (key, text) in the rows' order.

    Args:
        model: in evaluation mode.
        batches: prompts padded on the left.
        tokenizer: the model's own.
        max_new_tokens: longest answer; it may end sooner by the end-of-text token.
    """
    for batch in batches:
        moved = batch.to(model.device, model.dtype)
        new_ids = model.generate(
            moved.input_ids,
            moved.pixel_values,
            moved.has_image,
            attention_mask=moved.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for key, text in zip(
            batch.keys, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True
        ):
            yield key, " ".join(text.split())


@torch.inference_mode()
def summed_loss(model: DehvfForConditionalGeneration, batches: Iterable[Batch]) -> tuple[float, int]:
    """Sum of the cross-entropy over supervised tokens, in nats, and their number."""
    loss_sum, num_tokens = 0.0, 0
    for batch in batches:
        output = model(**batch.to(model.device, model.dtype).inputs())
        loss_sum += float(output.loss_sum)
        num_tokens += int(output.num_tokens)
    return loss_sum, num_tokens
