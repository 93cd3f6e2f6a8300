"""Loads the language model's tokenizer."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dehvf_ds.config import UserError


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory or hub id; one without a pad token pads with its end of text.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {source}: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
