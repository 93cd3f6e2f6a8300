"""From a picture to the tower's pixels, by the tower's own image processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from dehvf_ds.config import UserError
from dehvf_ds.model.pictures import to_pixels

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class ImageTransform:
    """A tower's own image processor as a function of one picture.

    Attributes:
        image_size: side of the square output in pixels.
        processor: the configured image processor.
    """

    def __init__(self, processor: BaseImageProcessor):
        """Wraps a configured processor and learns its output size from a trial picture.

        Raises:
            UserError: the processor gives pictures that are not square.
        """
        self.processor = processor
        trial, other = (self(Image.new("RGB", size)).shape for size in ((40, 20), (20, 40)))
        if trial != other or trial[-1] != trial[-2]:
            raise UserError(
                f"the vision tower's image processor gives pictures of {trial[-2]} x {trial[-1]} and "
                f"{other[-2]} x {other[-1]} pixels, not one square; set model.image_size"
            )
        self.image_size: int = trial[-1]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Resizes, crops and normalises a picture (float32), see ``to_pixels``."""
        return to_pixels(self.processor, image)


def build_image_transform(vision_tower_dir: str | Path, image_size: int | None) -> ImageTransform:
    """Builds the transform of a vision tower from its ``preprocessor_config.json``, in the PIL backend.

    Args:
        vision_tower_dir: local directory or hub id of the tower.
        image_size: side of the output in pixels. None, or the size that the processor makes anyway, keeps
            its own way of resizing; for another the shortest edge is resized to it and the centre cropped.

    Raises:
        UserError: there is no such file, or it is not an image processor's.
    """
    directory = Path(vision_tower_dir)
    if directory.is_dir() and not any((directory / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(f"{directory}: no {PROCESSOR_FILES[0]}; copy it from where the vision tower came")
    try:
        processor = AutoImageProcessor.from_pretrained(str(vision_tower_dir), backend="pil")
        if image_size is not None and _output_size(processor) != image_size:
            sizes = _sizes_for(processor.size, image_size)
            processor = AutoImageProcessor.from_pretrained(str(vision_tower_dir), backend="pil", **sizes)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.vision_tower {vision_tower_dir}: no usable image processor: {reason}"
        ) from None
    return ImageTransform(processor)


def _output_size(processor: BaseImageProcessor) -> int | None:
    try:
        return ImageTransform(processor).image_size
    except UserError:
        return None


def _sizes_for(own_size: Mapping[str, Any] | Any, image_size: int) -> dict[str, Any]:
    square = {"height": image_size, "width": image_size}
    if own_size is not None and own_size["height"]:
        # A tower that squashes to a square (SigLIP) keeps to it.
        return {"do_resize": True, "size": square, "crop_size": square}
    return {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "do_center_crop": True,
        "crop_size": square,
    }
