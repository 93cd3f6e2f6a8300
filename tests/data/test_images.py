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


def scene(width, height):
    """Something like a photograph: soft colours, edges and grain."""
    draw = np.random.default_rng(0)
    soft = Image.fromarray(draw.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((width, height), 3)
    for x, y, side in draw.integers(0, min(width, height) // 2, (40, 3)).tolist():
        soft.paste(tuple(draw.integers(0, 256, 3).tolist()), (x, y, x + side, y + side // 3))
    grain = draw.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))


def of_quarters(image):
    width, height = image.size
    return [image.getpixel((width * x // 4, height * y // 4)) for y in (1, 3) for x in (1, 3)]


def assert_colours(found, expected, atol):
    np.testing.assert_allclose(np.array(found, int), np.array(expected, int), atol=atol)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("kind", "mode", "atol"),
    [
        ("PNG", "RGB", 0),
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
    picture = quarters().quantize(8) if mode == "P" else quarters().convert(mode)
    data = encoded(picture, kind)
    assert (b"Adobe" in data) == (kind == "JPEG" and mode == "CMYK")
    found = decode_image(data)
    assert (type(found), found.mode, found.size) == (Image.Image, "RGB", (32, 16))
    assert_colours(of_quarters(found), [RED, GREEN, BLUE, WHITE], atol)


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
        (line("L", 0, 255), "PNG", {}, [0, 255]),
        (line("1", 0, 255), "PNG", {}, [0, 255]),
        (line("1", 0, 255), "TIFF", {}, [0, 255]),
        # Transparency is laid on white.
        (BLACKS, "PNG", {}, [0, 127, 255]),
        (BLACKS.convert("LA"), "PNG", {}, [0, 127, 255]),
        (BLACKS, "WEBP", {"lossless": True}, [0, 127, 255]),
        (BLACKS, "TIFF", {}, [0, 127, 255]),
        *((TWO, "PNG", {"transparency": key}, [255, (10, 20, 30)]) for key in (0, b"\x00\xff", b"\x00")),
        (line("L", 7, 255), "PNG", {"transparency": 7}, [255, 255]),
        (line("L", 7, 9), "PNG", {"transparency": 7}, [255, 9]),
        (line("1", 0, 255), "PNG", {"transparency": 0}, [255, 255]),
        (line("RGB", (7, 7, 7), (255, 0, 0)), "PNG", {"transparency": (7, 7, 7)}, [255, (255, 0, 0)]),
        (line("I;16", 1799, 32896), "PNG", {"transparency": 1799}, [255, 128]),
        # More than eight bits are scaled, 16 of them however dark.
        (numbers(np.uint16, 0, 32896, 65535), "PNG", {}, [0, 128, 255]),
        (numbers(np.uint16, 0, 100, 257), "PNG", {}, [0, 0, 1]),
        (numbers(np.uint16, 0, 32896, 65535), "TIFF", {}, [0, 128, 255]),
        (numbers(np.int32, -5, 100, 255), "TIFF", {}, [0, 100, 255]),
        (numbers(np.int32, 0, 32896, 65535), "TIFF", {}, [0, 128, 255]),
        (numbers(np.int32, 0, 100000, 200000), "TIFF", {}, [0, 128, 255]),
        (numbers(np.float32, 0, 0.5, 1), "TIFF", {}, [0, 128, 255]),
        (numbers(np.float32, 0, 100, 255), "TIFF", {}, [0, 100, 255]),
        (numbers(np.float32, np.nan, np.inf, 0.2), "TIFF", {}, [0, 255, 51]),
    ],
)
def test_pixels_of_every_mode(picture, kind, options, expected):
    found = decode_image(encoded(picture, kind, **options))
    colours = [(value,) * 3 if isinstance(value, int) else value for value in expected]
    assert [found.getpixel((x, 0)) for x in range(found.width)] == colours


KINDS = {
    "I;16": Image.fromarray(np.arange(60000, dtype=np.uint16).reshape(300, 200)),
    "F": Image.fromarray(np.linspace(-1, 200, 60000, dtype=np.float32).reshape(300, 200)),
    "LA": Image.merge(
        "LA", [Image.linear_gradient("L").resize((200, 300)), Image.radial_gradient("L").resize((200, 300))]
    ),
    "P": Image.linear_gradient("L").resize((200, 300)).quantize(9),
}


@pytest.mark.parametrize("mode", KINDS)
def test_bands_of_a_picture_are_converted_as_the_whole_and_take_little_memory(mode, monkeypatch):
    data = encoded(
        KINDS[mode], "TIFF" if mode == "F" else "PNG", **({"transparency": 4} if mode == "P" else {})
    )
    whole = np.asarray(decode_image(data))
    monkeypatch.setattr(pictures, "BAND_PIXELS", 1400)
    tracemalloc.start()
    try:
        banded = np.asarray(decode_image(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(banded, whole)
    assert len(np.unique(whole)) > 5
    # Of numbers in Python; two copies of the decoded picture are the test's own.
    assert peak < 3 * whole.nbytes


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert_colours(decode_image(data).getpixel((10, 5)), RED, 6)


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
        assert_colours(of_quarters(found), [RED, GREEN, BLUE, WHITE], 4)


@pytest.mark.parametrize(
    ("size", "shorter_side", "expected"),
    [
        ((1600, 1200), 75, (200, 150)),
        ((1600, 1200), 76, (400, 300)),
        ((1200, 1600), 76, (300, 400)),
        ((1601, 1203), 76, (401, 301)),
        ((1600, 1200), 300, (800, 600)),
        ((1600, 1200), 301, (1600, 1200)),
        ((40, 30), 1000, (40, 30)),
    ],
)
def test_draft_keeps_twice_the_shorter_side(size, shorter_side, expected):
    assert decode_image(encoded(Image.new("RGB", size), "JPEG"), shorter_side=shorter_side).size == expected
    assert decode_image(encoded(Image.new("RGB", size), "PNG"), shorter_side=shorter_side).size == size


@pytest.mark.parametrize(
    ("mode", "options", "shorter_side"),
    [("RGB", {}, 40), ("L", {"progressive": True}, 75), ("CMYK", {"subsampling": 0, "quality": 95}, 140)],
)
def test_draft_looks_like_the_full_picture(mode, options, shorter_side):
    data = encoded(scene(900, 600).convert(mode), "JPEG", **options)
    size = (shorter_side * 3 // 2, shorter_side)
    pictures = [decode_image(data), decode_image(data, shorter_side=shorter_side)]
    assert pictures[1].width < pictures[0].width
    full, draft = (np.asarray(picture.resize(size, Image.Resampling.BICUBIC), int) for picture in pictures)
    # The largest measured is 0.48 of 255.
    assert abs(full - draft).mean() < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off(kind):
    data = encoded(scene(90, 60), kind)
    for share in (0.001, 0.01, 0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=NOT_READABLE):
            decode_image(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no bytes"),
        (b"no picture", "of no known format"),
        (bytes(1000), "of no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "of no known format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"),
        (b"  <svg xmlns='x'/>", "it is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    ],
)
def test_no_picture(data, told):
    with pytest.raises(ValueError, match=f"^not a readable picture: {told}"):
        decode_image(data)


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 10_000), (2**31 - 1, 2**31 - 1), (9, 65_536)])
def test_too_large_is_seen_in_the_header(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels; at most 100,000,000 are"):
        decode_image(png_header(*size) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    # PIL's own limit is as it was.
    assert Image.MAX_IMAGE_PIXELS is not None


def test_large_is_decoded_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 40)
    picture = decode_image(encoded(Image.new("RGB", (40, 40))))
    assert random_view(picture, AugmentConfig(min_crop=0.9), seed=0, epoch=0, example=0).width > 35
    with pytest.raises(ValueError, match="41 x 40 pixels"):
        decode_image(encoded(Image.new("RGB", (41, 40))))


def text_chunk(kind: bytes, text: bytes) -> bytes:
    heads = {b"tEXt": b"a\0", b"iTXt": b"a\0\1\0\0\0", b"zTXt": b"a\0\0", b"iCCP": b"a\0\0"}
    return png_chunk(kind, heads[kind] + (text if kind == b"tEXt" else zlib.compress(text)))


@pytest.mark.parametrize("at", [33, -12], ids=["before", "after"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_huge_texts_and_profiles_of_a_png_are_not_unpacked(kind, at):
    """The picture is decoded as without them, in little memory, and turned as a text says that it is."""
    data = encoded(quarters())
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='3' tiff:Orientation=\"3\"/>"
    texts = text_chunk(kind, bytes(40_000_000)) + text_chunk(kind, bytes(1_000_000)) * 70
    given = data[:at] + texts + png_chunk(b"iTXt", xmp) + data[at:]
    tracemalloc.start()
    try:
        found = decode_image(given)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_colours(of_quarters(found), [WHITE, BLUE, GREEN, RED], 0)
    assert peak < 3 * len(given) + 1_000_000


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nothing of the kind", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"]
)
def test_damaged_exif_is_nothing(exif):
    data = encoded(quarters(), "JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert_colours(of_quarters(decode_image(data)), [RED, GREEN, BLUE, WHITE], 8)


def test_warned_of_is_accepted():
    # An animation of no frames: PIL warns and takes the default picture.
    data = encoded(quarters())
    data = data[:33] + png_chunk(b"acTL", bytes(8)) + data[33:]
    with pytest.warns(UserWarning, match="Invalid APNG"), Image.open(io.BytesIO(data)) as opened:
        opened.load()
    assert_colours(of_quarters(decode_image(data)), [RED, GREEN, BLUE, WHITE], 0)


def some_pictures():
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("a", "b" * 50, zip=True)
    exif[0x0112], exif[0x010E] = 6, "what is seen"
    small, frames = scene(40, 30), [Image.new("RGB", (9, 9), colour) for colour in (RED, GREEN)]
    animated = {"save_all": True, "append_images": frames[1:]}
    return [
        encoded(small, "JPEG", exif=exif, quality=60),
        encoded(small, "JPEG", progressive=True, quality=30),
        encoded(small.quantize(16), "PNG", pnginfo=text, transparency=bytes(8), exif=exif),
        encoded(small.convert("I;16"), "PNG"),
        encoded(small, "WEBP", exif=exif),
        *(encoded(frames[0], kind, **animated) for kind in ("PNG", "WEBP")),
        encoded(small.quantize(16), "GIF"),
        encoded(small, "TIFF", compression="tiff_lzw"),
    ]


SOME_PICTURES = some_pictures()


@settings(max_examples=300, deadline=timedelta(seconds=20), derandomize=True)
@given(
    st.sampled_from(range(len(SOME_PICTURES))),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.05, 3),
    st.sampled_from([None, 8]),
)
@example(0, [(0.3, 0)], 1.0, 8)
def test_damaged_bytes_give_a_picture_or_a_value_error(number, flips, length, shorter_side):
    data = bytearray(SOME_PICTURES[number])
    for place, value in flips:
        # Most flips near the start, where the headers are.
        data[int(place**3 * len(data))] = value
    data = bytes(data[: int(length * len(data))])
    try:
        outcome = decode_image(data, shorter_side=shorter_side).mode
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


def views(config, *, seed=0, epochs=1, examples=1, size=(400, 200)):
    picture = coordinates(*size)
    return [
        random_view(picture, config, seed=seed, epoch=epoch, example=number)
        for epoch in range(epochs)
        for number in range(examples)
    ]


def test_the_same_view_on_every_machine():
    config = AugmentConfig(min_crop=0.3, flip=0.5)
    found = [box_of(view) for view in views(config, seed=2**64 + 1, epochs=2, examples=2)]
    assert found == [(332, 0, 66, 199), (35, 0, 213, 178), (145, 0, 388, 195), (219, 36, 391, 194)]
    assert found == [box_of(view) for view in views(config, seed=1, epochs=2, examples=2)]
    config = AugmentConfig(min_crop=0.1)
    boxes = [box_of(view) for seed in (0, 1, -1) for view in views(config, seed=seed, epochs=4, examples=25)]
    assert len(set(boxes)) == 300


def test_crops_are_as_asked_for():
    found = views(AugmentConfig(min_crop=0.2), examples=2000, size=(250, 250))
    shares = np.array([view.width * view.height / 250**2 for view in found])
    aspects = np.log([view.width / view.height for view in found])
    assert 0.195 < shares.min() < 0.22
    assert shares.max() <= 1
    # Up to 3/4 of the area every ratio fits into a square, so no share is rejected more often than another.
    counts = np.histogram(shares, 5, (0.2, 0.7))[0]
    assert counts == pytest.approx(np.full(5, counts.mean()), rel=0.15)
    assert abs(aspects).max() < np.log(4 / 3) + 0.02
    assert abs(aspects.mean()) < 0.02
    # Every side is touched, and none is left.
    small = views(AugmentConfig(min_crop=0.05), examples=3000, size=(40, 30))
    boxes = np.array([box_of(view) for view in small])
    assert [*boxes.min(0)[:2], *boxes.max(0)[2:]] == [0, 0, 39, 29]


def test_flips():
    found = [box_of(view) for view in views(AugmentConfig(flip=0.3), examples=2000, size=(6, 4))]
    assert set(found) == {(5, 0, 0, 3), (0, 0, 5, 3)}
    assert np.mean([box == (5, 0, 0, 3) for box in found]) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (1, 1)), ((1, 200), (1, 1)), ((200, 1), (1, 1)), ((9000, 30), (40, 30)), ((30, 250), (30, 40))],
)
def test_extreme_pictures(size, expected):
    view = random_view(Image.new("RGB", size), AugmentConfig(min_crop=0.9), seed=0, epoch=0, example=0)
    assert view.size == expected


def test_build_augment():
    assert build_augment(AugmentConfig(), seed=3) is None
    assert build_augment(AugmentConfig(flip=0.5), seed=3) is not None
    config = AugmentConfig(min_crop=0.3, flip=0.5)
    augment = pickle.loads(pickle.dumps(build_augment(config, seed=3)))
    picture = coordinates(400, 200)
    view = augment(picture, Sample(key="a", image=picture, record={}, epoch=2, example=5))
    assert box_of(view) == box_of(random_view(picture, config, seed=3, epoch=2, example=5))
