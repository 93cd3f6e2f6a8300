"""Batched generation and likelihood with a whole model on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        max_new_tokens: longest answer in tokens; it may end sooner by an end token.
        min_new_tokens: tokens before which no end token is taken.
        num_beams: hypotheses of beam search; 1 is greedy.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1


def require_positions(num_prompt_tokens: int, decoding: Decoding, model_config: DehvfConfig) -> None:
    """Refuses answers that would be longer than the decoder has positions for.

    Args:
        num_prompt_tokens: of the longest prompt.
        decoding: lengths.
        model_config: of the model that answers.

    Raises:
        UserError: they would.
    """
    most = model_config.max_tokens
    if most is not None and num_prompt_tokens + decoding.max_new_tokens > most:
        raise UserError(
            f"max_new_tokens {decoding.max_new_tokens} behind a prompt of {num_prompt_tokens} is more than "
            f"the {most} tokens that the language model has positions for"
        )


class Answer(NamedTuple):
    """A text, and the tokens that were generated for it, its end included."""

    text: str
    num_tokens: int


def end_ids(model: DehvfForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's end of text, and those of the generation settings.

    A chat template ends a turn with a token of its own, which instruction-tuned decoders name there. A merged
    model has the decoder's settings as its own.
    """
    ends: list[Any] = [tokenizer.eos_token_id]
    settings: list[Any] = [getattr(part, "generation_config", None) for part in (model.language_model, model)]
    if getattr(settings[1], "_from_model_config", True):
        settings.pop()  # not read from a directory
    for part in settings:
        named: Any = getattr(part, "eos_token_id", None)
        ends += [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys(ends))


@torch.inference_mode()
def decode_answers(
    model: DehvfForConditionalGeneration,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> Iterator[list[str]]:
    """As ``decode_counted``, the texts alone."""
    for answers in decode_counted(model, batches, tokenizer, decoding):
        yield [answer.text for answer in answers]


@torch.inference_mode()
def decode_counted(
    model: DehvfForConditionalGeneration,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    streamer: BaseStreamer | None = None,
) -> Iterator[list[Answer]]:
    """Decodes greedily or with beams; yields the answers of each batch, in the rows' order.

    The visual memory of a picture is computed once and serves every step and every beam of its row.

    Args:
        model: in evaluation mode.
        batches: prompts padded on the left.
        tokenizer: the model's own.
        decoding: lengths and beams.
        streamer: is handed tokens as they come; for batches of one row.
    """
    ends = end_ids(model, tokenizer)
    for batch in batches:
        moved = batch.to(model.device, model.dtype)
        new_ids = model.generate(
            moved.input_ids,
            moved.pixel_values,
            moved.has_image,
            attention_mask=moved.attention_mask,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            num_beams=decoding.num_beams,
            do_sample=False,
            streamer=streamer,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        )
        # The end token is the last that counts; padding follows.
        ended = torch.isin(new_ids, torch.tensor(ends, device=new_ids.device)).long()
        counts = ((ended.cumsum(dim=1) - ended) == 0).sum(dim=1)
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        yield [Answer(" ".join(text.split()), int(n)) for text, n in zip(texts, counts, strict=True)]


@torch.inference_mode()
def likeliest_options(
    model: DehvfForConditionalGeneration,
    batches: Iterable[Batch],
    option_ids: Sequence[int],
    num_options: Sequence[int],
) -> Iterator[list[int | None]]:
    """Of each row's options the one whose token is the likeliest to come next; None where a logit is none.

    Args:
        model: in evaluation mode.
        batches: prompts that end where the option's letter is to come, padded on the left.
        option_ids: the token of each option, in their order.
        num_options: options of each row, over all batches in turn.
    """
    start = 0
    for batch in batches:
        moved = batch.to(model.device, model.dtype)
        generated = model.generate(
            moved.input_ids,
            moved.pixel_values,
            moved.has_image,
            attention_mask=moved.attention_mask,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = generated.logits[0][:, list(option_ids)].float()  # pyright: ignore[reportAttributeAccessIssue]
        counts = num_options[start : start + len(logits)]
        start += len(logits)
        yield [
            None if row[:count].isnan().any() else int(row[:count].argmax())
            for row, count in zip(logits, counts, strict=True)
        ]


@torch.inference_mode()
def summed_loss(model: DehvfForConditionalGeneration, batches: Iterable[Batch]) -> tuple[float, int]:
    """Sum of the cross-entropy over supervised tokens, in nats, and their number."""
    loss_sum, num_tokens = 0.0, 0
    for batch in batches:
        output = model(**batch.to(model.device, model.dtype).inputs())
        loss_sum += float(output.loss_sum)
        num_tokens += int(output.num_tokens)
    return loss_sum, num_tokens
