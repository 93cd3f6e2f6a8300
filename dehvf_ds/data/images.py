"""From a picture's bytes to an upright RGB picture, and random views of it for training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
from jaxtyping import Float64
from PIL import Image, UnidentifiedImageError

from dehvf_ds.batch import Sample
from dehvf_ds.config import AugmentConfig
from dehvf_ds.data.order import Purpose, random_words
from dehvf_ds.data.shards import foreign_kind, one_line
from dehvf_ds.model.pictures import open_bytes, upright_rgb

MAX_PIXELS = 100_000_000
"""Largest picture decoded, width x height. PIL takes 4 bytes a pixel and conversions as much again, so
this is 0.4 to 0.9 GB in a worker, 1.9 GB for WebP and JPEG 2000. A small file can claim far more."""

MAX_SIDE = 65_535
"""Longest side decoded, as in JPEG. Rows longer than PIL reads at once take time with the square of their
length: a WebP of 200 bytes that claims 10 million x 9 pixels took 40 s."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM"),
    # Since Pillow 11.3.
    *(("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()),
)
"""What is decoded, by PIL's names. Not all that PIL knows, since some formats start other programs (EPS)."""

MAX_ASPECT = 4 / 3
"""Widest random crop, width to height; the narrowest is its inverse. As torchvision's."""

CROP_TRIES = 10


def decode_image(data: bytes, *, shorter_side: int | None = None) -> Image.Image:
    """Decodes a picture in one of ``FORMATS`` as ``upright_rgb`` does; of an animation the first frame.

    PIL's warnings are ignored. Not for threads: Python's warning filters belong to the whole process.
    Anything but a whole picture of a known format within ``MAX_PIXELS`` and ``MAX_SIDE`` (checked before any
    pixel is decoded) is a ``ValueError`` of one line.

    With ``shorter_side``, the side in pixels that the picture is resized to later, large JPEGs are decoded
    at 1/2, 1/4 or 1/8 of their size: 3000 x 2000 pixels are decoded and resized to 224 in 29 ms instead of
    75, and differ by 0.8 of 255 on average. If a part is cropped first, pass proportionally more.
    """
    if not data:
        raise ValueError("not a readable picture: no bytes")
    try:
        with warnings.catch_warnings(action="ignore"), _open(data) as opened:
            return upright_rgb(opened, shorter_side=shorter_side)
    except UnidentifiedImageError as error:
        # HEIC's mark follows a length of four bytes.
        kind = foreign_kind(data[:64].lstrip()) or foreign_kind(data[4:64])
        found = f"it is {kind}" if kind else "unknown format, or cut off in its header"
        raise ValueError(f"not a readable picture: {found}") from error
    # PIL's parsers let any exception through: struct.error, EOFError, zlib.error, KeyError, ...
    except Exception as error:
        raise ValueError(f"not a readable picture: {one_line(error) or type(error).__name__}") from error


def _open(data: bytes) -> Image.Image:
    """Reads only the header and checks the size."""
    # PIL's own limit is higher, and its error does not tell width and height; in decoding it holds again.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        opened = open_bytes(data, FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = opened.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded, and {MAX_SIDE:,} on a side"
        )
    return opened


def build_augment(config: AugmentConfig, *, seed: int) -> Callable[[Image.Image, Sample], Image.Image] | None:
    """Builds the function from a sample's picture to its random view; None if augmentation is off."""
    if config.min_crop == 1 and config.flip == 0:
        return None
    return partial(random_view, config=config, seed=seed)


def random_view(image: Image.Image, sample: Sample, *, config: AugmentConfig, seed: int) -> Image.Image:
    """Crops a random part and flips it at random: a pure function of (seed, epoch, example).

    The part's share of the area is uniform in [min_crop, 1] and its aspect ratio log-uniform in [3/4, 4/3],
    as in the Inception paper (Szegedy et al. 2014, section 6) and torchvision's RandomResizedCrop; if no such
    part fits, it is the largest centred one of an allowed ratio. Unlike there it is not resized: the tower's
    processor does that, and what the tower sees depends on it:

    - CLIP and DINOv2 resize the shorter edge and keep the centred square, 3/4 to 1 of the part's area (0.87
      on average); DINOv2 then keeps (224/256)^2 = 0.77 of that.
    - SigLIP squashes the part to a square: all of it is seen, at most 4/3 out of proportion.
    """
    words = random_words(seed, Purpose.VIEW, sample.epoch, 0, sample.example, 1 + 4 * CROP_TRIES)
    units = (words >> np.uint64(11)) * 2.0**-53
    if config.min_crop < 1:
        box = _draw_box(image.size, config.min_crop, units[1:].reshape(CROP_TRIES, 4))
        # PIL warns of large crops, too.
        with warnings.catch_warnings(action="ignore"):
            image = image.crop(box)
    if units[0] < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _draw_box(
    size: tuple[int, int], min_crop: float, tries: Float64[np.ndarray, "tries 4"]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the first part that fits, each try being (area, aspect, x, y)."""
    width, height = size
    for area_unit, aspect_unit, x, y in tries.tolist():
        area = width * height * (min_crop + (1 - min_crop) * area_unit)
        aspect = MAX_ASPECT ** (2 * aspect_unit - 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * MAX_ASPECT)), min(height, round(width * MAX_ASPECT))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
