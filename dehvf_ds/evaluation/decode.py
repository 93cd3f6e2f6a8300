"""Generation and likelihoods of one batch, by a full model on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dehvf_ds.batch import Batch
from dehvf_ds.config import require
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

MAX_NEW_TOKENS = {"caption": 40, "scienceqa": 8, "chat": 256}
"""Default longest answer in tokens, by the task that a model was trained for."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded: their lengths in tokens, and the hypotheses of beam search; 1 is greedy."""

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1


class Answer(NamedTuple):
    """A text, and the number of tokens generated for it, its end token included."""

    text: str
    num_tokens: int


def require_positions(num_prompt_tokens: int, decoding: Decoding, model_config: DehvfConfig) -> None:
    """Refuses answers that may run past the decoder's last position; ``num_prompt_tokens`` is the longest."""
    most = model_config.max_tokens
    require(
        most is None or num_prompt_tokens + decoding.max_new_tokens <= most,
        f"max_new_tokens {decoding.max_new_tokens} after a prompt of {num_prompt_tokens} is more than "
        f"the {most} tokens that the language model has positions for",
    )


def end_ids(tokenizer: PreTrainedTokenizerBase, *settings: GenerationConfig | None) -> list[int]:
    """Ids that end an answer: the tokenizer's end of text, then those that generation settings name.

    Chat templates end a turn with a token of their own; instruction-tuned decoders name it in theirs.
    """
    ends: list[Any] = [tokenizer.eos_token_id]
    for part in settings:
        named = getattr(part, "eos_token_id", None)
        ends += named if isinstance(named, list) else [named]
    return list(dict.fromkeys(end for end in ends if end is not None))


@torch.inference_mode()
def decode(
    model: DehvfForConditionalGeneration,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Answers left-padded prompts; a picture is encoded once for all steps and beams.

    ``streamer`` receives the tokens of a batch of one row as they come.
    """
    own = model.generation_config
    # A merged model has the decoder's settings as its own; others' are derived from their configuration.
    own = None if getattr(own, "_from_model_config", True) else own
    ends = end_ids(tokenizer, model.language_model.generation_config, own)
    new_ids = _generate(
        model,
        batch,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        num_beams=decoding.num_beams,
        streamer=streamer,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    )
    # The end token is the last that counts; padding follows.
    ended = torch.isin(new_ids, torch.tensor(ends, device=new_ids.device)).long()
    counts = ((ended.cumsum(dim=1) - ended) == 0).sum(dim=1)
    texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return [Answer(" ".join(text.split()), int(n)) for text, n in zip(texts, counts, strict=True)]


@torch.inference_mode()
def likeliest_options(
    model: DehvfForConditionalGeneration, batch: Batch, option_ids: Sequence[int], num_options: Sequence[int]
) -> list[int | None]:
    """The number of each row's likeliest option, by the next token; None where a logit is NaN.

    Prompts are padded on the left and end right before the option's token.
    """
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    logits = _generate(model, batch, **settings).logits[0][:, list(option_ids)].float()
    return [
        None if row[:count].isnan().any() else int(row[:count].argmax())
        for row, count in zip(logits, num_options, strict=True)
    ]


def _generate(model: DehvfForConditionalGeneration, batch: Batch, **settings: Any) -> Any:
    moved = batch.to(model.device, model.dtype)
    return model.generate(
        moved.input_ids,
        moved.pixel_values,
        moved.has_image,
        picture=moved.picture,
        attention_mask=moved.attention_mask,
        do_sample=False,
        **settings,
    )


@torch.inference_mode()
def summed_loss(model: DehvfForConditionalGeneration, batch: Batch) -> tuple[float, int]:
    """Sum of the cross-entropy over supervised tokens, in nats, and their number."""
    output = model(**batch.to(model.device, model.dtype).inputs())
    return float(output.loss_sum), int(output.num_supervised)
