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
                a row. A picture is PIL's, the path or the bytes of a file, an address, or an array or tensor
                of bytes or of shares of 1, ``[height, width, 3]`` or ``[3, height, width]``; of a batch of
                them each is a row's. EXIF orientation, transparency and 16 bits are treated as in training.
            text: a prompt, or a list of prompts. No placeholder stands for the picture.
            **kwargs: ``add_special_tokens=False`` takes prompts to the letter, begin of text included; others
                are ignored.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``; ``has_image`` where some
            rows have none. All are tensors.

        Raises:
            ValueError: not as many pictures as prompts, several for one prompt, or what is no picture.
        """
        to_the_letter = not kwargs.get("add_special_tokens", True)
        features: dict[str, Any] = {}
        rows = _one_picture_a_row(images)
        if text is not None:
            prompts = [text] if not _is_list(text) else list(text)
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("text is a prompt, or a list of prompts, one a row")
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
        picture = _opened(picture)
        # Decoded at the scale that training decodes at.
        side = to_pixels(self.image_processor, Image.new("RGB", (32, 32))).shape[-1]
        return to_pixels(self.image_processor, upright_for(picture, side))


def _one_picture_a_row(images: Any) -> list[Any]:
    """One picture or None for each row."""
    if images is None:
        return []
    if getattr(images, "ndim", 0) == 4:
        images = list(images)
    if not _is_list(images):
        return [images]
    rows = [row if _is_list(row) else [row] for row in images]
    if any(len(row) > 1 for row in rows):
        raise ValueError("several pictures for one prompt; the model takes one")
    return [row[0] if row else None for row in rows]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _opened(picture: Any) -> Image.Image:
    """A picture as PIL's, whatever it was given as.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        if isinstance(picture, str | Path) and Path(picture).is_file():
            picture = Path(picture).read_bytes()
        elif isinstance(picture, Path):
            raise ValueError(f"{picture}: no such file")
        elif isinstance(picture, str):
            return load_image(picture)  # an address, or base64
        elif hasattr(picture, "read"):
            picture = picture.read()
        if isinstance(picture, bytes | bytearray):
            return Image.open(io.BytesIO(picture))
    except OSError as error:
        raise ValueError(f"no picture can be read: {error}") from None
    if not hasattr(picture, "ndim"):
        raise ValueError(
            f"a {type(picture).__name__} is no picture; give PIL's, a path, an address or an array"
        )
    return Image.fromarray(_as_bytes(picture))


def _as_bytes(array: Any) -> np.ndarray:
    """The bytes of an array or tensor, ``[height, width]`` or with 1, 3 or 4 channels last, or first.

    Raises:
        ValueError: it has another shape, or values that are neither bytes nor shares of 1.
    """
    channels_first = isinstance(array, torch.Tensor)
    values = array.detach().cpu().float().numpy() if channels_first else np.asarray(array)
    while values.ndim > 3 and len(values) == 1:
        values = values[0]
    places = (0, 2) if channels_first else (2, 0)
    if values.ndim == 3:
        place = next((place for place in places if values.shape[place] in (1, 3, 4)), None)
        values = np.empty(0) if place is None else np.moveaxis(values, place, 2)
        values = values[..., 0] if values.shape[-1:] == (1,) else values
    if values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(f"an array of shape {list(array.shape)} is no picture of 1, 3 or 4 channels")
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"an array of values from {low:g} to {high:g} is no picture; give bytes, or shares of 1 before "
            "they are normalised"
        )
    shares = str(array.dtype).endswith("bool") or (_is_float(array) and high <= 1)
    return (values.astype(np.float32) * (255 if shares else 1)).round().astype(np.uint8)


def _is_float(array: Any) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"
