"""Loads the language model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dehvf_ds.config import UserError
from dehvf_ds.model.fingerprint import POINTER, is_pointer


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory or hub id; one without a pad token pads with its end of text.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of a damaged file, about anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        pointers = [path for path in sorted(Path(source).glob("*")) if path.is_file() and is_pointer(path)]
        if pointers:
            reason = f"{pointers[0].name} is {POINTER}"
        raise UserError(f"no tokenizer at {source}: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuses a tokenizer that is another model's, as far as its size tells.

    Args:
        tokenizer: the language model's.
        num_embeddings: rows of the language model's embedding; models have some more than ids, never fewer.

    Raises:
        UserError: it has ids beyond them, or knows less than half of them.
    """
    vocabulary = tokenizer.get_vocab()
    name = f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
    token = max(vocabulary, key=lambda word: vocabulary[word])
    if vocabulary[token] >= num_embeddings:
        raise UserError(
            f"{name}: its token {token!r} has id {vocabulary[token]}, but the language model has "
            f"{num_embeddings} embeddings; take the tokenizer that came with the model"
        )
    if 2 * len(vocabulary) < num_embeddings:
        raise UserError(
            f"{name}: knows {len(vocabulary)} tokens, and the language model has {num_embeddings} "
            "embeddings; take the tokenizer that came with the model"
        )
