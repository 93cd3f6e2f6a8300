"""From a text to ids: one way for training, evaluation, generation and the exported processor (ours).

What a tokenizer does by itself around a text (a begin of text, an end of text, [CLS] and [SEP]) is not taken:
before a prompt stands its begin of text, if it has the habit of putting one, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from .configuration import ModelError

# Prompts end and targets begin like these.
_SEAM_PROBES = (("picture:", "The dog"), ("Response:", "The answer is"), ("a", "b"))


@dataclass(frozen=True)
class TokenizerTraits:
    """How a tokenizer behaves where prompt and target meet.

    Attributes:
        bos: ids that it puts before a text by itself; empty or the begin-of-text id.
        seam: text put before the target so that its ids continue the prompt's: a space for byte-level BPE,
            nothing for sentencepiece, which starts every text with one of its own.
        eos_id: end-of-text id.
        pad_id: padding id; the end-of-text id where the tokenizer has none.
    """

    bos: tuple[int, ...]
    seam: str
    eos_id: int
    pad_id: int


@lru_cache(maxsize=8)
def tokenizer_traits(tokenizer: PreTrainedTokenizerBase) -> TokenizerTraits:
    """Finds out by trial how a tokenizer behaves.

    The seam is the one that makes the ids of prompt and target, taken apart, equal those of the whole text.

    Raises:
        ModelError: the tokenizer has no end-of-text token, or no seam makes prompt and target one text.
    """
    eos_id = tokenizer.eos_token_id
    name = tokenizer_name(tokenizer)
    if not isinstance(eos_id, int):
        raise ModelError(f"{name}: no end-of-text token; set eos_token in its tokenizer_config.json")
    for seam in (" ", ""):
        if all(
            text_ids(tokenizer, prompt) + text_ids(tokenizer, seam + target)
            == text_ids(tokenizer, f"{prompt} {target}")
            for prompt, target in _SEAM_PROBES
        ):
            pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_id
            return TokenizerTraits(bos_ids(tokenizer), seam, eos_id, pad_id)
    raise ModelError(f"{name}: 'prompt' and ' target' taken apart differ from 'prompt target' in ids")


@lru_cache(maxsize=8)
def bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text by itself: none, or the begin-of-text id."""
    first = tokenizer("a").input_ids[0]
    return (first,) if first == tokenizer.bos_token_id and first != text_ids(tokenizer, "a")[0] else ()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt, as it stands before a target and as generation begins from it: [bos] prompt.

    Space at its end is left out: the target brings its own. Of nothing at all there is a begin: the
    end-of-text token stands for it where the tokenizer puts no begin of text.

    Raises:
        ModelError: the tokenizer cannot be used, see ``tokenizer_traits``.
    """
    traits = tokenizer_traits(tokenizer)
    stripped = prompt.rstrip()
    return [*traits.bos, *(text_ids(tokenizer, stripped) if stripped else [])] or [traits.eos_id]


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """The ids of a target behind its prompt, without its end of text; special tokens in it are plain text.

    Raises:
        ModelError: the tokenizer cannot be used, see ``tokenizer_traits``.
    """
    seam = tokenizer_traits(tokenizer).seam if prompt.rstrip() else ""
    return text_ids(tokenizer, seam + target, plain=True) if target else []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    """The ids of a text and of nothing around it.

    Args:
        tokenizer: the language model's.
        text: of any length; it is not cut.
        plain: special tokens in it are plain text.
    """
    # verbose=False: a text above the tokenizer's model_max_length is no mistake here.
    return tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=plain).input_ids


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokenizer NAME``, as messages to the user call it."""
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
