"""From a picture to pixels: one way for training, evaluation, generation and exported processors (ours)."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, load_image

from .configuration import Float

DRAFT_MARGIN = 2
"""A JPEG is decoded at least this many times larger than needed, which leaves the resize to the processor."""

BAND_PIXELS = 1 << 22
"""Pictures with 16 bits or transparency are converted this many pixels at a time."""

THIN = 16
"""Ratio of the sides from which a picture is cropped before a resize that keeps its proportions."""

MAX_TEXT_BYTES = 1 << 23
"""A PNG's EXIF and XMP texts are read up to this size, all together."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Texts in which programs write a picture's orientation.
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0")
# The value of white in modes that do not imply it: the smallest of these that no value exceeds.
_WHITES = {"I": (255, 65535), "F": (1, 255, 65535)}


def to_pixels(processor: Any, image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Resizes, crops and normalises one PIL picture with the tower's own image processor (float32)."""
    picture = crop_thin(upright_rgb(image), processor)
    shortcut = _shortcut_of(processor)
    pixels = None if shortcut is None else shortcut(picture)
    return _by_processor(processor, picture) if pixels is None else pixels


def _by_processor(processor: Any, picture: Image.Image) -> Float[Tensor, "3 height width"]:
    return processor(images=picture, return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True)
class Shortcut:
    """What a processor computes, bit for bit, without its copies and checks: 1.5 times as fast or more.

    Attributes:
        size: height and width that a picture is resized to, or its shorter side.
        resample: PIL's filter.
        crop: height and width of the part in the middle; None keeps all.
        values: the normalised value of every byte in each channel.
    """

    size: int | tuple[int, int]
    resample: int
    crop: tuple[int, int] | None
    values: Float[np.ndarray, "3 256"]

    def __call__(self, picture: Image.Image) -> Float[Tensor, "3 height width"] | None:
        """The pixels of an RGB picture; None if it is smaller than the crop, which is then padded."""
        height, width = get_resize_output_image_size(
            np.broadcast_to(np.uint8(0), (3, picture.height, picture.width)),
            size=self.size,
            default_to_square=False,
            input_data_format=ChannelDimension.FIRST,
        )
        picture = picture.resize((width, height), resample=self.resample)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if top < 0 or left < 0:
                return None
            picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        values = np.asarray(picture)
        pixels = np.empty((3, *values.shape[:2]), dtype=np.float32)
        for channel in range(3):
            # `clip` spares a check of indices that no byte fails.
            np.take(self.values[channel], values[..., channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)


_TRIALS = ((40, 30), (30, 41), (257, 255), (500, 333), (97, 640), (224, 224), (7, 5), (1, 1))
"""Width and height of the pictures that a shortcut is tried on."""

_SETTINGS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
_shortcuts: WeakKeyDictionary[Any, tuple[list[Any], Shortcut | None]] = WeakKeyDictionary()


def _shortcut_of(processor: Any) -> Shortcut | None:
    """The processor's shortcut, tried once for its settings; None if it has none that gives the same bits."""
    settings = [getattr(processor, name, None) for name in _SETTINGS]
    known = _shortcuts.get(processor)
    if known is None or known[0] != settings:
        known = _shortcuts[processor] = (deepcopy(settings), _try_shortcut(processor))
    return known[1]


def _try_shortcut(processor: Any) -> Shortcut | None:
    """Reads a processor's settings and compares with it on random pictures, whatever its class."""
    random, ramp = np.random.default_rng(0), np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    # Some processors take other settings, and may fail in any way.
    with contextlib.suppress(Exception):
        side, crop, size = _sides(processor.size), _sides(processor.crop_size), None
        if side.keys() == {"shortest_edge"}:
            size = side["shortest_edge"]
        elif side.keys() == {"height", "width"}:
            size = side["height"], side["width"]
        if size is None or not processor.do_resize:
            return None
        every_byte = Image.fromarray(np.repeat(ramp, 3, axis=2))
        plain = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
        values = np.asarray(processor(images=every_byte, **plain)["pixel_values"][0])
        shortcut = Shortcut(
            size=size,
            resample=int(processor.resample),
            crop=(crop["height"], crop["width"]) if processor.do_center_crop else None,
            values=np.ascontiguousarray(values.reshape(3, 256), dtype=np.float32),
        )
        num_equal = 0
        for width, height in _TRIALS:
            picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            if (found := shortcut(picture)) is not None:
                expected = _by_processor(processor, picture)
                if expected.dtype != found.dtype or not torch.equal(found, expected):
                    return None
                num_equal += 1
        return shortcut if num_equal else None
    return None


def upright_rgb(image: Image.Image, *, shorter_side: int | None = None) -> Image.Image:
    """The picture upright and in mode RGB; the original is not changed, but may be loaded.

    EXIF orientation is applied; transparency becomes white (diagrams are often black on nothing); 16-bit
    and float grey is scaled to 8 bits, not clipped. Colour profiles are ignored. On damaged files PIL's
    parsers raise almost anything.

    If the picture is to be resized to a ``shorter_side`` in pixels, a large JPEG that is not loaded yet is
    decoded at 1/2, 1/4 or 1/8 of its size, its shorter side still at least ``DRAFT_MARGIN`` times that.
    """
    with warnings.catch_warnings(action="ignore"):
        if shorter_side is not None:
            # Only the scale: a mode would convert grey and CMYK to something else.
            image.draft(None, (DRAFT_MARGIN * shorter_side, DRAFT_MARGIN * shorter_side))
        image.load()
        # Damaged EXIF leaves the pixels intact.
        with contextlib.suppress(Exception):
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def upright_for(image: Image.Image, side: int) -> Image.Image:
    """As ``upright_rgb`` with ``shorter_side``, for a picture that its owner may still need whole.

    Decoding at a smaller scale changes it for good, so a large JPEG that is not loaded yet is read twice.
    """
    file, large = getattr(image, "fp", None), min(image.size) >= 2 * DRAFT_MARGIN * side
    # Many phones and cameras write a JPEG followed by other pictures, which PIL calls MPO.
    scales = image.format in ("JPEG", "MPO") and image.tell() == 0
    if not large or not scales or not getattr(image, "tile", None) or file is None:
        return upright_rgb(image)
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    image.load()
    return upright_rgb(Image.open(io.BytesIO(data), formats=["JPEG"]), shorter_side=side)


def crop_thin(image: Image.Image, processor: Any) -> Image.Image:
    """Crops a thin picture to the middle part that the processor cuts its centred square from.

    A processor that resizes the shorter side makes 256 x 768,000 pixels of 1 x 3000, and keeps 224 x 224.
    What is left here is many times that, of a length that puts the square on the same pixels.
    """
    size = _sides(getattr(processor, "size", None))
    if not getattr(processor, "do_resize", True) or getattr(processor, "do_pad", False) or size.get("height"):
        return image  # nothing grows beyond a square
    kept = max(_sides(getattr(processor, "crop_size", None)).values(), default=0)
    shorter, longer = sorted(image.size)
    edge = size.get("shortest_edge") or kept or 1
    ratio = max(THIN, math.ceil(4 * kept / edge))
    if longer <= ratio * shorter:
        return image
    # Of the same parity as the whole, before and after the resize: then neither centre moves.
    lengths = range(ratio * shorter - (longer - ratio * shorter) % 2, longer, 2)[:64]
    length = next(
        (n for n in lengths if (edge * n // shorter - edge * longer // shorter) % 2 == 0), lengths[0]
    )
    before = (longer - length) // 2
    if image.width == longer:
        return image.crop((before, 0, before + length, image.height))
    return image.crop((0, before, image.width, before + length))


def _sides(size: Any) -> dict[str, int]:
    """The sides in a processor's setting: a mapping, transformers' own kind of mapping, or a number."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {} if size is None else {key: value for key, value in dict(size).items() if value}


def _to_rgb(image: Image.Image) -> Image.Image:
    if type(image) is Image.Image and image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = (np.asarray(band) for _, band in _bands(image))
        peak = max(float(np.max(each, where=np.isfinite(each), initial=0)) for each in values)
        white = next((white for white in _WHITES.get(image.mode, (65535,)) if peak <= white), peak)
        return _by_bands(image, lambda band: _scale_to_bytes(band, white))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _by_bands(image, _on_white)
    return image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Yields a picture's stripes and their boxes, so that conversions need memory for one stripe only."""
    height = max(1, BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        yield box, image.crop(box)


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    whole = Image.new("RGB", image.size)
    for box, band in _bands(image):
        whole.paste(convert(band), box)
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey, which PIL converts only to LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


def _scale_to_bytes(image: Image.Image, white: float) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    scaled = np.clip(np.nan_to_num(values * np.float32(255 / white)), 0, 255).round().astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        scaled[values == key] = 255
    return Image.fromarray(scaled)


def open_bytes(data: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens a picture file's bytes and reads its header.

    PIL refuses a PNG with large texts or colour profiles. They do not change a pixel, so they are removed,
    except that the texts with the orientation are kept up to ``MAX_TEXT_BYTES``.
    """
    if not data.startswith(_PNG):
        return Image.open(io.BytesIO(data), formats=formats)
    whole, start, room = memoryview(data), len(_PNG), MAX_TEXT_BYTES
    kept: list[bytes | memoryview] = [whole[:start]]
    while start + 12 <= len(data):
        # A chunk: length, kind, content, checksum.
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            break
        if kind not in _PNG_TEXTS:
            kept.append(whole[start:end])
        elif room > 0 and data.startswith(_PNG_ORIENTATION, start + 8):
            text = b"tEXt" + _plain_text(kind, data[start + 8 : end - 4], room)
            kept.append(struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)))
            room -= len(text)
        start = end
    return Image.open(io.BytesIO(b"".join([*kept, whole[start:]])), formats=formats)


def _plain_text(kind: bytes, content: bytes, limit: int) -> bytes:
    """The content of a PNG's text chunk as that of a ``tEXt``: unpacked, and cut after ``limit`` bytes."""
    keyword, _, rest = content.partition(b"\0")
    is_packed, text = kind == b"zTXt", rest.removeprefix(b"\0") if kind == b"zTXt" else rest
    if kind == b"iTXt":
        # Before the text: whether and how it is compressed, its language, the keyword translated.
        is_packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if is_packed:
        try:
            text = zlib.decompressobj().decompress(text, limit)
        except zlib.error:
            text = b""
    return keyword + b"\0" + text[:limit]


def open_picture(picture: Any) -> Image.Image:
    """A PIL picture, from one, a path, an address, or a file's bytes."""
    if isinstance(picture, Image.Image):
        return picture
    try:
        if isinstance(picture, str) and not Path(picture).is_file():
            return load_image(picture)  # an address, or base64
        if isinstance(picture, str | Path):
            picture = Path(picture).read_bytes()
        if isinstance(picture, bytes | bytearray):
            return open_bytes(bytes(picture))
    except OSError as error:
        raise ValueError(f"no picture can be read: {error}") from None
    kind = type(picture).__name__
    raise ValueError(f"a {kind} is no picture; give PIL's (Image.fromarray of an array), a path, an address")
