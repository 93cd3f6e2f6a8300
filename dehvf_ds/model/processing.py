"""The processor: the tower's image processor and the decoder's tokenizer behind one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class DehvfProcessor(ProcessorMixin):
    """Turns pictures and prompts into the model's inputs.

    Args:
        image_processor: the vision tower's own processor.
        tokenizer: the language model's tokenizer.
        chat_template: Jinja of a conversation; its messages' contents are texts or lists of parts.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Processes a batch for ``generate``: prompts padded on the left, a picture a row or none.

        Args:
            images: a PIL picture or, for several rows, a list with a picture, a list of one picture, or None
                a row. Transparency is laid on white, as in training.
            text: a prompt, or a list of prompts. No placeholder stands for the picture.
            **kwargs: ``add_special_tokens`` for the tokenizer; others are ignored.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``; ``has_image`` where some
            rows have none. All are tensors.

        Raises:
            ValueError: not as many pictures as prompts, or several pictures for one prompt.
        """
        special = kwargs.get("add_special_tokens", True)
        features: dict[str, Any] = {}
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if self.tokenizer.pad_token_id is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            features |= self.tokenizer(
                prompts,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                return_token_type_ids=False,
                add_special_tokens=special,
            )
        rows = _one_picture_a_row(images)
        if text is not None and rows and len(rows) != len(prompts):
            raise ValueError(
                f"{len(rows)} pictures for {len(prompts)} prompts; a row has one picture or None"
            )
        present = [picture for picture in rows if picture is not None]
        if present:
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            has_image = torch.tensor([picture is not None for picture in rows])
            if len(present) < len(rows):
                features["has_image"] = has_image
                spread = pixels.new_zeros(len(rows), *pixels.shape[1:])
                spread[has_image] = pixels
                pixels = spread
            features["pixel_values"] = pixels
        return BatchFeature(data=features)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Writes a conversation as text, or with ``tokenize`` as the model's inputs, its picture included.

        The template writes the begin-of-text token itself, where the model was trained with one.
        """
        if kwargs.get("tokenize"):
            given = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"add_special_tokens": False} | given
        return super().apply_chat_template(conversation, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "has_image"]


def _one_picture_a_row(images: Any) -> list[Any]:
    """One picture or None for each row, RGB."""
    if images is None:
        return []
    rows = list(images) if isinstance(images, Sequence) else [images]
    flat = [(row[0] if row else None) if isinstance(row, Sequence) else row for row in rows]
    if any(isinstance(row, Sequence) and len(row) > 1 for row in rows):
        raise ValueError("several pictures for one prompt; the model takes one")
    return [_to_rgb(row) if isinstance(row, Image.Image) else row for row in flat]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
