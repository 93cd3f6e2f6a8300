"""The processor: the tower's image processor and the decoder's tokenizer behind one call."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class DehvfProcessor(ProcessorMixin):
    """Turns pictures and prompts into the model's inputs.

    Args:
        image_processor: the vision tower's own processor.
        tokenizer: the language model's tokenizer.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Processes a batch for ``generate``: prompts padded on the left, a picture a row or none.

        Returns:
            ``input_ids``, ``attention_mask`` and, with pictures, ``pixel_values``.
        """
        kwargs.pop("return_tensors", None)
        features = {}
        if text is not None:
            if self.tokenizer.pad_token_id is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            features |= self.tokenizer(
                text, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
            )
        if images is not None:
            features |= self.image_processor(images, return_tensors="pt")
        return BatchFeature(data=features)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]
