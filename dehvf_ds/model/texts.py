"""Moved; this name goes with its last import."""

from .processing import (  # noqa: F401
    TokenizerTraits,
    bos_ids,
    prompt_ids,
    target_ids,
    text_ids,
    tokenizer_name,
    tokenizer_traits,
)
