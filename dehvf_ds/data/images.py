"""From a picture's bytes to an upright RGB picture, and random views of it for training."""

from __future__ import annotations

import io
import math
import struct
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
from dehvf_ds.data.shards import FOREIGN_FILES, one_line, told_by_first_bytes
from dehvf_ds.model.pictures import upright_rgb

MAX_PIXELS = 100_000_000
"""Largest picture decoded, width x height. PIL takes 4 bytes a pixel and conversions as much again, so
this is 0.4 to 0.9 GB in a worker, and 1.9 of WebP and JPEG 2000; a photograph is nearly always smaller, and a
small file can claim far more."""

MAX_SIDE = 65_535
"""Longest side decoded, as JPEG has it. Where a row is longer than PIL reads at once, its time goes with the
square of the row: a WebP of 200 bytes that claims 10 million x 9 pixels took 40 s."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM"),
    # Of Pillow 11.3 and later.
    *(("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()),
)
"""What is decoded, by PIL's names. Not all that PIL knows: some of it starts other programs (EPS)."""

MAX_ASPECT = 4 / 3
"""Widest random crop, width to height; the narrowest is its inverse. With ``CROP_TRIES`` as torchvision's."""

CROP_TRIES = 10

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Texts in which programs write how a picture is turned.
_PNG_TURNS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"xmp\0", b"exif\0")


def decode_image(data: bytes, *, shorter_side: int | None = None) -> Image.Image:
    """Decodes a picture as ``upright_rgb`` does; of an animation the first frame.

    What PIL only warns of is accepted in silence. Not for threads: Python's warning filters belong to the
    whole process. Bytes that are no whole picture of a known format, or one beyond ``MAX_PIXELS`` or
    ``MAX_SIDE`` (which is found before any pixel is decoded), are a ``ValueError`` of one line.

    Args:
        data: the file's bytes, in one of ``FORMATS``.
        shorter_side: shorter side in pixels that the picture is resized to later: a large JPEG is then
            decoded at 1/2, 1/4 or 1/8 of its size. A photograph of 3000 x 2000 pixels is so decoded and
            resized to 224 in 29 ms instead of 75, and differs by 0.8 of 255 on average. Where a part is
            cropped first, ask for as much more.
    """
    if not data:
        raise ValueError("not a readable picture: no bytes")
    try:
        with warnings.catch_warnings(action="ignore"), _open(data) as opened:
            return upright_rgb(opened, shorter_side=shorter_side)
    except UnidentifiedImageError as error:
        heads = data[:64].lstrip(), data[4:64]
        if kind := next(filter(None, (told_by_first_bytes(head, FOREIGN_FILES) for head in heads)), None):
            raise ValueError(f"not a readable picture: it is {kind}") from error
        raise ValueError("not a readable picture: of no known format, or cut off in its header") from error
    # PIL's parsers let through whatever they stumble over: struct.error, EOFError, zlib.error, KeyError, ...
    except Exception as error:
        raise ValueError(f"not a readable picture: {one_line(error) or type(error).__name__}") from error


def random_view(
    image: Image.Image, config: AugmentConfig, *, seed: int, epoch: int, example: int
) -> Image.Image:
    """Crops a random part and flips it at random: a pure function of (seed, epoch, example).

    The part's share of the area is uniform in [min_crop, 1] and its aspect ratio log-uniform in [3/4, 4/3],
    as in the Inception paper (Szegedy et al. 2014, section 6) and torchvision's RandomResizedCrop; where no
    such part fits, it is the largest centred one of an allowed ratio. Unlike there it is not resized, for the
    tower's processor does that, and what the tower sees depends on it:

    - CLIP and DINOv2 resize the shorter edge and crop the centre. Nothing is ever squashed; of the part they
      keep the centred square, 3/4 to 1 of its area (0.87 on average), so of the picture at least
      3/4 min_crop where a part fitted. DINOv2 then keeps (224/256)^2 = 0.77 of that.
    - SigLIP squashes the part to a square: all of it is seen, at most 4/3 out of proportion.
    """
    units = _draw_units(seed, epoch, example, 1 + 4 * CROP_TRIES)
    if config.min_crop < 1:
        box = _draw_box(image.size, config.min_crop, units[1:].reshape(CROP_TRIES, 4))
        # A crop that PIL finds large is warned of, too.
        with warnings.catch_warnings(action="ignore"):
            image = image.crop(box)
    if units[0] < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def build_augment(config: AugmentConfig, *, seed: int) -> Callable[[Image.Image, Sample], Image.Image] | None:
    """Builds the function that takes a sample's picture to its random view, or None if all is switched off.

    It can be pickled, so that workers may be spawned.
    """
    if config.min_crop == 1 and config.flip == 0:
        return None
    return partial(_view_of_sample, config=config, seed=seed)


def _view_of_sample(image: Image.Image, sample: Sample, *, config: AugmentConfig, seed: int) -> Image.Image:
    return random_view(image, config, seed=seed, epoch=sample.epoch, example=sample.example)


def _draw_units(seed: int, epoch: int, example: int, count: int) -> Float64[np.ndarray, " count"]:
    """Random numbers in [0, 1)."""
    return (random_words(seed, Purpose.VIEW, epoch, 0, example, count) >> np.uint64(11)) * 2.0**-53


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


def _open(data: bytes) -> Image.Image:
    """Reads the header alone and checks the size."""
    # PIL's own limit is higher and its error does not tell width and height; in decoding it holds again.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        opened = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = opened.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded, and {MAX_SIDE:,} on a side"
        )
    return opened


def _without_texts(data: bytes) -> bytes:
    """A PNG's bytes without texts and colour profiles, for PIL refuses pictures with large ones.

    They do not change a pixel here, but for those that may turn the picture. Other bytes as they are.
    """
    if not data.startswith(_PNG):
        return data
    whole, start = memoryview(data), len(_PNG)
    kept = [whole[:start]]
    while start + 12 <= len(data):
        # A chunk: length, kind, content, checksum.
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            break
        if kind not in _PNG_TEXTS or data.startswith(_PNG_TURNS, start + 8):
            kept.append(whole[start:end])
        start = end
    return b"".join([*kept, whole[start:]])
