"""The processor: texts to ids, and the tower's image processor and the decoder's tokenizer behind one call.

Training, evaluation, generation and exports tokenise with the functions here (ours). Special tokens that a
tokenizer adds by itself (begin of text, end of text, [CLS], [SEP]) are left out, except for a begin of text
before the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .configuration import ModelError
from .pictures import open_picture, to_pixels, upright_for

# How prompts end and targets begin.
_SEAM_PROBES = (("picture:", "The dog"), ("Response:", "The answer is"), ("a", "b"))
# Arguments that say where to load from.
_PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class TokenizerTraits:
    """How a tokenizer treats the seam of prompt and target, and its special tokens."""

    bos: tuple[int, ...]
    """ids that it adds before a text; empty or the begin-of-text id"""
    seam: str
    """text before the target that makes its ids continue the prompt's: a space for byte-level BPE, nothing
    for sentencepiece, which adds one itself"""
    eos_id: int
    pad_id: int
    """the end-of-text id if there is no padding token"""


@lru_cache(maxsize=8)
def tokenizer_traits(tokenizer: PreTrainedTokenizerBase) -> TokenizerTraits:
    """Finds out how a tokenizer behaves by trying; one that cannot be used raises ``ModelError``.

    With the right seam the ids of prompt and target, tokenised separately, are those of the whole text.
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
    raise ModelError(f"{name}: 'prompt' and ' target' taken apart have other ids than 'prompt target'")


@lru_cache(maxsize=8)
def bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer adds before a text: none, or the begin-of-text id."""
    first = tokenizer("a").input_ids[0]
    return (first,) if first == tokenizer.bos_token_id and first != text_ids(tokenizer, "a")[0] else ()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt, before a target or for generation: [bos] prompt.

    Trailing space is stripped, as the target begins with its own. A prompt without any ids becomes the
    end-of-text token.
    """
    traits = tokenizer_traits(tokenizer)
    stripped = prompt.rstrip()
    return [*traits.bos, *(text_ids(tokenizer, stripped) if stripped else [])] or [traits.eos_id]


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """The ids of a target after its prompt, without end of text; special tokens in it are plain text."""
    seam = tokenizer_traits(tokenizer).seam if prompt.rstrip() else ""
    return text_ids(tokenizer, seam + target, plain=True) if target else []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    """The ids of a text, not truncated; ``plain`` takes special tokens in it as plain text."""
    # verbose=False: no warning of texts longer than the tokenizer's model_max_length.
    return tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=plain).input_ids


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """``tokenizer NAME``, for messages."""
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


class DehvfProcessor(ProcessorMixin):
    """Turns pictures and prompts into the model's inputs, as in training.

    With ``written_prompts`` prompts are conversations formatted by ``chat_template``, and taken verbatim.
    Otherwise they are instructions, stripped of trailing space.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        written_prompts: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.written_prompts = written_prompts

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> Any:
        """Loads a processor like ``ProcessorMixin``, but with the PIL backend, as in training.

        With torchvision installed transformers would use that, which resizes differently.
        """
        processor = super().from_pretrained(source, **kwargs)
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **place)
        return processor

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Writes the processor like ``ProcessorMixin``, but with a ``PreTrainedTokenizerFast``.

        Other classes rebuild parts of a tokenizer at loading, from settings that are not all saved (LLaMA's
        ``legacy``).
        """
        written = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        if getattr(self.tokenizer, "is_fast", False) and path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return written

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Processes a batch for ``generate``: prompts padded on the left, at most one picture a row.

        ``images`` is a picture (PIL, path, bytes of a file, or URL) or, for several rows, a list with a
        picture, a list of one picture, or None a row. ``text`` is a prompt or a list of them, without
        placeholders for pictures. ``add_special_tokens=False`` takes prompts verbatim, begin of text
        included; other arguments are ignored.

        Returns tensors ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``; ``has_image``
        if some rows have none.
        """
        features: dict[str, Any] = {}
        rows = _one_picture_a_row(images)
        if text is not None:
            prompts = list(text) if _is_list(text) else [text]
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("text must be a prompt or a list of prompts")
            if rows and len(rows) != len(prompts):
                raise ValueError(
                    f"{len(rows)} pictures for {len(prompts)} prompts; pass a picture or None a row"
                )
            features |= self._ids(prompts, kwargs.get("add_special_tokens", True))
        present = torch.tensor([picture is not None for picture in rows], dtype=torch.bool)
        if present.any():
            pixels = torch.stack([self._pixels(picture) for picture in rows if picture is not None])
            features["pixel_values"] = pixels
            if not present.all():
                features["has_image"] = present
                features["pixel_values"] = pixels.new_zeros(len(rows), *pixels.shape[1:])
                features["pixel_values"][present] = pixels
        return BatchFeature(data=features)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Formats a conversation as text, or with ``tokenize`` as the model's inputs, its picture included.

        The template itself writes the begin-of-text token, if the model was trained with one.
        """
        if kwargs.get("tokenize"):
            more = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"add_special_tokens": False} | more
        return super().apply_chat_template(conversation, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names that a call may return."""
        return ["input_ids", "attention_mask", "pixel_values", "has_image"]

    def _ids(self, prompts: Sequence[str], add_special_tokens: bool) -> dict[str, torch.Tensor]:
        traits = tokenizer_traits(self.tokenizer)
        if self.written_prompts or not add_special_tokens:
            rows = [text_ids(self.tokenizer, prompt) or [traits.eos_id] for prompt in prompts]
        else:
            rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[traits.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _pixels(self, picture: Any) -> torch.Tensor:
        # Decoded at the same scale as in training.
        side = to_pixels(self.image_processor, Image.new("RGB", (32, 32))).shape[-1]
        return to_pixels(self.image_processor, upright_for(open_picture(picture), side))


def _one_picture_a_row(images: Any) -> list[Any]:
    if images is None or not _is_list(images):
        return [] if images is None else [images]
    rows = [row if _is_list(row) else [row] for row in images]
    if any(len(row) > 1 for row in rows):
        raise ValueError("several pictures for one prompt; the model takes one")
    return [row[0] if row else None for row in rows]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
