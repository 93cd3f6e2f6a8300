from __future__ import annotations

import io
import pickle
import re
import struct
import tracemalloc
import zlib
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from dehvf_ds.batch import Sample
from dehvf_ds.config import AugmentConfig
from dehvf_ds.data import images
from dehvf_ds.data.images import build_augment, decode_image, random_view
from dehvf_ds.model import pictures

RED, GREEN, BLUE, WHITE = (220, 30, 20), (10, 180, 60), (20, 40, 200), (255, 255, 255)
NOT_READABLE = r"^not a readable picture: [^\n]+$"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quarters(width=32, height=16):
    """Red and green above blue and white."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def assert_quarters(image, expected, atol):
    width, height = image.size
    found = [image.getpixel((width * x // 4, height * y // 4)) for y in (1, 3) for x in (1, 3)]
    np.testing.assert_allclose(np.array(found, int), np.array(expected, int), atol=atol)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("kind", "mode", "atol"),
    [
        ("PNG", "P", 0),
        ("WEBP", "RGB", 6),
        ("GIF", "P", 0),
        ("BMP", "RGB", 0),
        ("DIB", "RGB", 0),
        *([("AVIF", "RGB", 8)] if "AVIF" in images.FORMATS else []),
        ("PPM", "RGB", 0),
        ("TIFF", "CMYK", 1),
        ("TIFF", "LAB", 20),  # 8 bits of LAB are coarse in the dark
        ("JPEG2000", "RGB", 0),
        ("JPEG", "RGB", 8),
        ("JPEG", "CMYK", 8),  # written inverted, with Adobe's marker
    ],
)
def test_colours(kind, mode, atol):
    picture = quarters(128, 64)
    data = encoded(picture.quantize(8) if mode == "P" else picture.convert(mode), kind)
    for shorter_side in (None, 16):
        found = decode_image(data, shorter_side=shorter_side)
        size = (64, 32) if shorter_side and kind == "JPEG" else (128, 64)
        assert (type(found), found.mode, found.size) == (Image.Image, "RGB", size)
        assert_quarters(found, [RED, GREEN, BLUE, WHITE], atol)


def line(mode, *values, palette=None):
    """A picture one pixel high."""
    image = Image.new(mode, (len(values), 1))
    if palette:
        image.putpalette(palette)
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def numbers(kind, *values):
    return Image.fromarray(np.array([values], kind))


BLACKS = line("RGBA", (0, 0, 0, 255), (0, 0, 0, 128), (0, 0, 0, 0))
TWO = line("P", 0, 1, palette=[0, 0, 0, 10, 20, 30])


@pytest.mark.parametrize(
    ("picture", "kind", "options", "expected"),
    [
        (line("1", 0, 255), "PNG", {}, [0, 255]),
        # Transparency becomes white.
        (BLACKS, "PNG", {}, [0, 127, 255]),
        (BLACKS.convert("LA"), "PNG", {}, [0, 127, 255]),
        (BLACKS, "WEBP", {"lossless": True}, [0, 127, 255]),
        *((TWO, "PNG", {"transparency": key}, [255, (10, 20, 30)]) for key in (0, b"\x00\xff")),
        (line("L", 7, 9), "PNG", {"transparency": 7}, [255, 9]),
        (line("RGB", (7, 7, 7), (255, 0, 0)), "PNG", {"transparency": (7, 7, 7)}, [255, (255, 0, 0)]),
        (line("I;16", 1799, 32896), "PNG", {"transparency": 1799}, [255, 128]),
        # More than eight bits are scaled, 16 of them however dark.
        (numbers(np.uint16, 0, 100, 257), "PNG", {}, [0, 0, 1]),
        (numbers(np.uint16, 0, 32896, 65535), "TIFF", {}, [0, 128, 255]),
        (numbers(np.int32, -5, 100, 255), "TIFF", {}, [0, 100, 255]),
        (numbers(np.int32, 0, 100000, 200000), "TIFF", {}, [0, 128, 255]),
        (numbers(np.float32, 0, 100, 255), "TIFF", {}, [0, 100, 255]),
        (numbers(np.float32, np.nan, np.inf, 0.2), "TIFF", {}, [0, 255, 51]),
    ],
)
def test_pixels_of_every_mode(picture, kind, options, expected):
    found = decode_image(encoded(picture, kind, **options))
    colours = [(value,) * 3 if isinstance(value, int) else value for value in expected]
    assert [found.getpixel((x, 0)) for x in range(found.width)] == colours


GRADIENTS = [gradient("L").resize((200, 300)) for gradient in (Image.linear_gradient, Image.radial_gradient)]


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.fromarray(np.arange(60000, dtype=np.uint16).reshape(300, 200)), "PNG", {}),
        (Image.fromarray(np.linspace(-1, 200, 60000, dtype=np.float32).reshape(300, 200)), "TIFF", {}),
        (Image.merge("LA", GRADIENTS), "PNG", {}),
        (GRADIENTS[0].quantize(9), "PNG", {"transparency": 4}),
    ],
)
def test_bands_of_a_picture_are_converted_as_the_whole_and_take_little_memory(
    image, kind, options, monkeypatch
):
    data = encoded(image, kind, **options)
    whole = np.asarray(decode_image(data))
    monkeypatch.setattr(pictures, "BAND_PIXELS", 1400)
    banded, peak = measured(data)
    np.testing.assert_array_equal(np.asarray(banded), whole)
    assert len(np.unique(whole)) > 5
    # Memory of Python's; the decoded picture is PIL's.
    assert peak < 2 * whole.nbytes


def measured(data):
    """The picture, and the most memory that Python's objects took."""
    tracemalloc.start()
    try:
        return decode_image(data), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shorter_side", [None, 16])
def test_exif_orientation_is_applied(shorter_side):
    ways = Image.Transpose
    stored = (ways.FLIP_LEFT_RIGHT, ways.ROTATE_180, ways.FLIP_TOP_BOTTOM, ways.TRANSPOSE, ways.ROTATE_90)
    for turn, way in enumerate((None, *stored, ways.TRANSVERSE, ways.ROTATE_270), start=1):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture = quarters(128, 64) if way is None else quarters(128, 64).transpose(way)
        found = decode_image(encoded(picture, "JPEG", exif=exif), shorter_side=shorter_side)
        assert found.size == ((64, 32) if shorter_side else (128, 64))
        assert_quarters(found, [RED, GREEN, BLUE, WHITE], 4)


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [((1601, 1203), 75, (201, 151)), ((1200, 1600), 76, (300, 400)), ((1600, 1200), 301, (1600, 1200))],
)
def test_draft_keeps_twice_the_shorter_side(size, shorter_side, expected):
    assert decode_image(encoded(Image.new("RGB", size), "JPEG"), shorter_side=shorter_side).size == expected
    assert decode_image(encoded(Image.new("RGB", size), "PNG"), shorter_side=shorter_side).size == size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    ],
)
def test_no_picture(data, message):
    with pytest.raises(ValueError, match=f"^not a readable picture: {message}"):
        decode_image(data)


@pytest.mark.parametrize("size", [(10_001, 10_000), (2**31 - 1, 2**31 - 1), (9, 65_536)])
def test_too_large_is_seen_in_the_header(size):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels; at most 100,000,000 are"):
        decode_image(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    # PIL's own limit is as it was.
    assert Image.MAX_IMAGE_PIXELS is not None


def test_warnings_of_pil_are_ignored(monkeypatch):
    # A large picture, and an animation without frames, of which PIL takes the default picture.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    data = encoded(quarters())
    data = data[:33] + png_chunk(b"acTL", bytes(8)) + data[33:]
    picture = decode_image(data)
    assert_quarters(picture, [RED, GREEN, BLUE, WHITE], 0)
    assert view(picture, AugmentConfig(min_crop=0.9)).size == (21, 16)


def text_chunk(kind, keyword, text):
    head = {b"tEXt": b"", b"iTXt": b"\1\0\0\0", b"zTXt": b"\0", b"iCCP": b"\0"}[kind]
    return png_chunk(kind, keyword + b"\0" + head + (text if kind == b"tEXt" else zlib.compress(text)))


def exif_text(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return b"\nexif\n      0\n" + exif.tobytes().hex().encode()


@pytest.mark.parametrize("at", [33, -12], ids=["before", "after"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize(
    ("keyword", "text", "count"),
    [
        (b"XML:com.adobe.xmp", b"<x tiff:Orientation='1' tiff:Orientation=\"3\"/>" + bytes(20_000_000), 4),
        (b"Raw profile type exif", exif_text(3) + b"00" * 1_000_000, 1),
    ],
    ids=["xmp", "exif"],
)
def test_large_texts_and_profiles_of_a_png_do_not_harm(kind, at, keyword, text, count, monkeypatch):
    """Beyond PIL's limits the picture is still decoded, turned as a text says, in little memory."""
    monkeypatch.setattr(pictures, "MAX_TEXT_BYTES", 1 << 21)
    data = encoded(quarters())
    texts = text_chunk(kind, b"a", bytes(70_000_000)) + text_chunk(kind, keyword, text) * count
    found, peak = measured(data[:at] + text_chunk(b"iCCP", b"b", bytes(9_000_000)) + texts + data[at:])
    assert_quarters(found, [WHITE, BLUE, GREEN, RED], 0)
    assert peak < 3 * len(texts) + 7 * pictures.MAX_TEXT_BYTES


def test_damaged_exif_is_ignored():
    exif, data = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", encoded(quarters(), "JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert_quarters(decode_image(data), [RED, GREEN, BLUE, WHITE], 8)


def still_pictures():
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("a", "b" * 50, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "c" * 50, zip=True)
    exif[0x0112], exif[0x010E] = 6, "what is seen"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    return [
        encoded(noise, "JPEG", exif=exif, quality=60),
        encoded(noise, "JPEG", progressive=True, quality=30),
        encoded(noise.quantize(16), "PNG", pnginfo=text, transparency=bytes(8), exif=exif),
        encoded(noise.convert("I;16"), "PNG"),
        encoded(noise, "WEBP", exif=exif),
        encoded(noise.quantize(16), "GIF"),
        encoded(noise, "BMP"),
        encoded(noise, "TIFF", compression="tiff_lzw"),
    ]


FRAMES = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
STILLS = still_pictures()
MOVING = [
    encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:]) for kind in ("GIF", "WEBP", "PNG")
]


@pytest.mark.parametrize("data", MOVING)
def test_first_frame_of_an_animation(data):
    assert_quarters(decode_image(data), [RED] * 4, 6)


@pytest.mark.parametrize("data", STILLS)
def test_cut_off(data):
    for share in (0.01, 0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=NOT_READABLE):
            decode_image(data[: int(share * len(data))])


@settings(max_examples=300, deadline=timedelta(seconds=20), derandomize=True)
@given(
    st.sampled_from([*STILLS, *MOVING]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.05, 3),
    st.sampled_from([None, 8]),
)
@example(STILLS[0], [(0.3, 0)], 1.0, 8)
def test_damaged_bytes_give_a_picture_or_a_value_error(picture, flips, length, shorter_side):
    data = bytearray(picture)
    for place, value in flips:
        # Most flips near the start, where the headers are.
        data[int(place**3 * len(data))] = value
    try:
        outcome = decode_image(bytes(data[: int(length * len(data))]), shorter_side=shorter_side).mode
    except ValueError as error:
        outcome = str(error)
    assert outcome == "RGB" or re.match(NOT_READABLE, outcome)


def coordinates(width, height):
    """A picture whose pixels tell where they are: x in red and green, y in blue."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, x // 256, y], axis=-1).astype(np.uint8))


def box_of(view):
    """Left, top, right, bottom of the view in its picture; left > right if it is flipped."""
    (x0, h0, y0), (x1, h1, y1) = view.getpixel((0, 0)), view.getpixel((view.width - 1, view.height - 1))
    return x0 + 256 * h0, y0, x1 + 256 * h1, y1


def view(picture, config, *, seed=0, epoch=0, number=0):
    sample = Sample(key="a", image=picture, record={}, epoch=epoch, example=number)
    return random_view(picture, sample, config=config, seed=seed)


def boxes(config, *, seed=0, epochs=1, examples=1, size=(400, 200)):
    picture = coordinates(*size)
    places = [(epoch, number) for epoch in range(epochs) for number in range(examples)]
    return [box_of(view(picture, config, seed=seed, epoch=epoch, number=number)) for epoch, number in places]


def test_the_same_view_on_every_machine():
    config = AugmentConfig(min_crop=0.3, flip=0.5)
    found = boxes(config, seed=2**64 + 1, epochs=2, examples=2)
    assert found == [(332, 0, 66, 199), (35, 0, 213, 178), (145, 0, 388, 195), (219, 36, 391, 194)]
    assert found == boxes(config, seed=1, epochs=2, examples=2)
    small = AugmentConfig(min_crop=0.1)
    crops = [box for seed in (0, 1, -1) for box in boxes(small, seed=seed, epochs=4, examples=25)]
    assert len(set(crops)) == 300
    # As workers and spawned processes use it.
    augment = pickle.loads(pickle.dumps(build_augment(config, seed=1)))
    picture = coordinates(400, 200)
    assert box_of(augment(picture, Sample(key="a", image=picture, record={}, epoch=1, example=1))) == found[3]
    assert build_augment(AugmentConfig(), seed=3) is None


def test_crops_are_distributed_as_documented():
    found = np.array(boxes(AugmentConfig(min_crop=0.2), examples=2000, size=(250, 250)))
    widths, heights = (found[:, 2:] - found[:, :2] + 1).T
    shares = widths * heights / 250**2
    assert 0.195 < shares.min() < 0.22
    # Up to 3/4 of the area every ratio fits into a square, so no share is rejected more often than another.
    counts = np.histogram(shares, 5, (0.2, 0.7))[0]
    assert counts == pytest.approx(np.full(5, counts.mean()), rel=0.15)
    assert abs(np.log(widths / heights)).max() < np.log(4 / 3) + 0.02
    assert abs(np.log(widths / heights).mean()) < 0.02
    # Every side is touched, and none is crossed.
    small = np.array(boxes(AugmentConfig(min_crop=0.05), examples=3000, size=(40, 30)))
    assert [*small.min(0)[:2], *small.max(0)[2:]] == [0, 0, 39, 29]
    flipped = boxes(AugmentConfig(flip=0.3), examples=2000, size=(6, 4))
    assert set(flipped) == {(5, 0, 0, 3), (0, 0, 5, 3)}
    assert np.mean([box == (5, 0, 0, 3) for box in flipped]) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (1, 1)), ((200, 1), (1, 1)), ((9000, 30), (40, 30)), ((30, 250), (30, 40))],
)
def test_extreme_pictures(size, expected):
    assert view(Image.new("RGB", size), AugmentConfig(min_crop=0.9)).size == expected
