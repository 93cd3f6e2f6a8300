"""The processor: the tower's image processor and the decoder's tokenizer behind one call."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from .pictures import to_pixels, upright_for
from .texts import prompt_ids, text_ids, tokenizer_traits

# What a hub is asked with.
_PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class DehvfProcessor(ProcessorMixin):
    """Turns pictures and prompts into the model's inputs, as in training.

    Args:
        image_processor: the vision tower's own processor.
        tokenizer: the language model's tokenizer.
        chat_template: Jinja of a conversation; its messages' contents are texts or lists of parts.
        written_prompts: prompts are conversations that ``chat_template`` has written, as the model was
            trained with: taken to the letter. Else they are instructions, whose last space is left out.
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
        """Loads a processor as ``ProcessorMixin.from_pretrained`` does; its pictures go through PIL.

        transformers would take torchvision where that is installed, which resizes otherwise than in training.
        """
        processor = super().from_pretrained(source, **kwargs)
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **place)
        return processor

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Writes the processor as ``ProcessorMixin.save_pretrained`` does; its tokenizer loads as it is now.

        A class of transformers builds parts of its tokenizer anew when it loads, and its settings (``legacy``
        of LLaMA's, for one) are not all saved; so the file is named as one to take as it stands.
        """
        written = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        if getattr(self.tokenizer, "is_fast", False) and path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return written

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Processes a batch for ``generate``: prompts padded on the left, a picture a row or none.

        Args:
            images: a picture or, for several rows, a list with a picture, a list of one picture, or None
                a row. A picture is PIL's, the path of a file, or an array of bytes ``[height, width, 3]``;
                EXIF orientation, transparency and 16 bits are treated as in training.
            text: a prompt, or a list of prompts. No placeholder stands for the picture.
            **kwargs: ``add_special_tokens=False`` takes prompts to the letter, begin of text included; others
                are ignored.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``; ``has_image`` where some
            rows have none. All are tensors.

        Raises:
            ValueError: not as many pictures as prompts, or several pictures for one prompt.
        """
        to_the_letter = not kwargs.get("add_special_tokens", True)
        features: dict[str, Any] = {}
        rows = _one_picture_a_row(images)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if rows and len(rows) != len(prompts):
                raise ValueError(
                    f"{len(rows)} pictures for {len(prompts)} prompts; a row has one picture or None"
                )
            features |= self._padded([self._prompt_ids(prompt, to_the_letter) for prompt in prompts])
        present = [picture for picture in rows if picture is not None]
        if present:
            pixels = torch.stack([self._pixels(picture) for picture in present])
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

    def _prompt_ids(self, prompt: str, to_the_letter: bool) -> list[int]:
        if not to_the_letter and not self.written_prompts:
            return prompt_ids(self.tokenizer, prompt)
        return text_ids(self.tokenizer, prompt) or [tokenizer_traits(self.tokenizer).eos_id]

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        width, pad_id = max(map(len, rows)), tokenizer_traits(self.tokenizer).pad_id
        ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _pixels(self, picture: Any) -> torch.Tensor:
        if isinstance(picture, str | Path) and Path(picture).is_file():
            picture = Image.open(io.BytesIO(Path(picture).read_bytes()))
        elif isinstance(picture, str):
            picture = load_image(picture)  # an address, or base64
        elif isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3:
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            return self.image_processor([picture], return_tensors="pt")["pixel_values"][0]
        # Decoded at the scale that training decodes at.
        side = to_pixels(self.image_processor, Image.new("RGB", (32, 32))).shape[-1]
        return to_pixels(self.image_processor, upright_for(picture, side))


def _one_picture_a_row(images: Any) -> list[Any]:
    """One picture or None for each row."""
    if images is None:
        return []
    if not isinstance(images, Sequence) or isinstance(images, str):
        return [images]
    rows = [row if isinstance(row, Sequence) and not isinstance(row, str) else [row] for row in images]
    if any(len(row) > 1 for row in rows):
        raise ValueError("several pictures for one prompt; the model takes one")
    return [row[0] if row else None for row in rows]
