"""One way from pictures to pixels and from texts to ids: training, evaluation, generation, processor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny_shards import write_shards
from tiny_tokenizers import TOKENIZERS, build_tokenizer
from transformers import AutoProcessor, BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.data.collate import Collator, ImageTransform, encode, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import QCM_A
from dehvf_ds.data.shards import ShardRow
from dehvf_ds.evaluation.dataset import open_questions
from dehvf_ds.evaluation.generate import read_picture
from dehvf_ds.model import DehvfProcessor
from dehvf_ds.model.pictures import crop_thin, to_pixels, upright_rgb

SIDE = 32
PROCESSORS = {
    "crop": CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=3
    ),
    "larger": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE}),
    "squash": SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
}


def drawing(width: int = 48, height: int = 40) -> Image.Image:
    """Neither even nor symmetric."""
    y, x = np.mgrid[:height, :width]
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    blue = 128 + 127 * np.sin(x / 3 + y / 5)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def oriented(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def odd_pictures() -> dict[str, bytes]:
    rgb, alpha = drawing(), drawing().convert("L")
    clear = rgb.copy()
    clear.putalpha(alpha)
    grey16 = np.asarray(alpha).astype(np.uint16) * 200
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 5000)
    found = {f"jpeg_exif{n}": encoded(rgb, "JPEG", **oriented(n)) for n in range(1, 9)}
    found |= {f"png_exif{n}": encoded(rgb, "PNG", **oriented(n)) for n in (3, 6)}
    found |= {f"png_{mode}": encoded(rgb.convert(mode)) for mode in ("RGB", "L", "1", "P")}
    return found | {
        "png_rgba": encoded(clear),
        "png_la": encoded(clear.convert("LA")),
        "png_text": encoded(rgb, pnginfo=text),
        "png_palette_transparent": encoded(rgb.quantize(16), transparency=3),
        "png_palette_alphas": encoded(rgb.quantize(16), transparency=bytes(range(0, 256, 16))),
        "png_rgb_key": encoded(rgb, transparency=rgb.getpixel((5, 5))),
        "png_grey_key": encoded(alpha, transparency=alpha.getpixel((5, 5))),
        "png_16": encoded(Image.fromarray(grey16)),
        "png_16_dark": encoded(Image.fromarray(grey16 // 100)),
        "tiff_16": encoded(Image.fromarray(grey16), "TIFF"),
        "tiff_i": encoded(Image.fromarray(grey16.astype(np.int32)), "TIFF"),
        "tiff_f": encoded(Image.fromarray(grey16.astype(np.float32) / 51000), "TIFF"),
        "tiff_f_large": encoded(Image.fromarray(grey16.astype(np.float32)), "TIFF"),
        "tiff_cmyk": encoded(rgb.convert("CMYK"), "TIFF"),
        "tiff_exif6": encoded(rgb, "TIFF", **oriented(6)),
        "jpeg_cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg_grey": encoded(alpha, "JPEG"),
        "jpeg_progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg_large": encoded(drawing(700, 500), "JPEG"),
        "jpeg_large_exif8": encoded(drawing(500, 700), "JPEG", **oriented(8)),
        "mpo_large": encoded(drawing(700, 500), "MPO", save_all=True, append_images=[drawing(70, 50)]),
        "gif": encoded(rgb.quantize(16), "GIF"),
        "gif_moving": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "gif_transparent": encoded(rgb.quantize(16), "GIF", transparency=2),
        "bmp": encoded(rgb, "BMP"),
        "webp": encoded(rgb, "WEBP", lossless=True),
        "webp_rgba": encoded(clear, "WEBP", lossless=True),
        "ppm": encoded(rgb, "PPM"),
        "jp2": encoded(rgb, "JPEG2000"),
        "one_pixel": encoded(drawing(1, 1)),
        "three_high": encoded(drawing(50, 3)),
        "three_wide": encoded(drawing(3, 3)),
        "thin": encoded(drawing(1, 300)),
        "thin_wide": encoded(drawing(301, 2)),
        "thin_odd": encoded(drawing(7, 100), "JPEG", **oriented(6)),
    }


class Recorder:
    """Stands in for a model: keeps what it is asked."""

    device, dtype, generation_config = torch.device("cpu"), torch.float32, None

    def __init__(self) -> None:
        self.language_model = self
        self.asked: list[torch.Tensor] = []

    def generate(self, input_ids, pixel_values, has_image, **_: Any) -> torch.Tensor:
        self.input_ids = input_ids
        self.asked += list(pixel_values)
        return torch.zeros(len(input_ids), 1, dtype=torch.long)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Each picture as a file; all of them in ``shards``."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, (name, data) in enumerate(odd_pictures().items()):
        (root / name).write_bytes(data)
        record = {"image_id": number, "file_name": name, "captions": ["A child."]}
        rows.append(ShardRow(key=name, members={"json": json.dumps(record).encode(), "png": data}))
    write_shards(rows, root / "shards", name="odd", samples_per_shard=100, builder={})
    return root


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_become_the_same_pixels_everywhere(pictures, tmp_path, kind) -> None:
    tokenizer = build_tokenizer("byte_bpe", tmp_path / "tokenizer")
    transform = ImageTransform(PROCESSORS[kind])
    names = list(odd_pictures())
    assert len(names) >= 40
    index = ShardIndex(pictures / "shards")
    trained = Collator(tokenizer, transform, task="caption", max_tokens=16)(
        [read_sample(index, row, caption=0, shorter_side=transform.image_size) for row in range(len(names))]
    ).pixel_values
    model: Any = Recorder()
    questions = open_questions(
        str(pictures / "shards"),
        "coco",
        tokenizer,
        transform,
        prompt="Picture:",
        scienceqa=QCM_A,
        caption_tokenizer="simple",
    )
    questions.ask(model, range(len(names)))
    generated = questions.collator(
        [
            sample
            for name in names
            if isinstance(sample := read_picture(str(pictures / name), {}, SIDE), Sample)
        ]
    ).pixel_values
    DehvfProcessor(PROCESSORS[kind], tokenizer).save_pretrained(tmp_path / "processor")
    processor = DehvfProcessor.from_pretrained(tmp_path / "processor")
    data = odd_pictures()
    opened = processor(images=[Image.open(io.BytesIO(data[name])) for name in names])["pixel_values"]
    by_path = processor(images=[str(pictures / name) for name in names])["pixel_values"]
    assert trained.shape == generated.shape == opened.shape == (len(names), 3, SIDE, SIDE)
    for number, name in enumerate(names):
        for found in (model.asked[number], generated[number], opened[number], by_path[number]):
            assert torch.equal(found, trained[number]), name
        # Loaded by its owner, in the file's own mode; a large JPEG is then decoded whole.
        image = Image.open(io.BytesIO(data[name]))
        image.load()
        loaded = processor(images=image)["pixel_values"][0]
        torch.testing.assert_close(loaded, trained[number], atol=0.1 if "large" in name else 0, rtol=0)


def test_another_frame_stays_the_one_that_is_given(tmp_path) -> None:
    frames = [drawing(700, 500), drawing(700, 500).rotate(180)]
    image = Image.open(io.BytesIO(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])))
    image.seek(1)
    processor = DehvfProcessor(PROCESSORS["squash"], build_tokenizer("byte_bpe", tmp_path))
    found, *expected = processor(images=[image, *reversed(frames)])["pixel_values"]
    assert (found - expected[0]).abs().mean() < 0.1 < (found - expected[1]).abs().mean()


def test_the_processor_leaves_the_pictures_that_it_is_given(pictures, tmp_path) -> None:
    processor = DehvfProcessor(PROCESSORS["crop"], build_tokenizer("byte_bpe", tmp_path))
    image = Image.open(pictures / "jpeg_large_exif8")
    processor(images=image)
    assert image.size == (500, 700)
    assert image.getexif()[0x0112] == 8
    assert np.asarray(image).shape == (700, 500, 3)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(48, 40), (40, 48), (160, 40), (40, 160), (32, 32), (31, 33)])
def test_ordinary_pictures_are_what_the_towers_own_processor_makes(kind, size) -> None:
    image = drawing(*size)
    expected = PROCESSORS[kind](images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(to_pixels(PROCESSORS[kind], image), expected)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(900, 50), (50, 901), (1711, 90), (5, 100), (117, 7), (3, 400)])
def test_thin_pictures_too(kind, size) -> None:
    """The edges that the crop leaves are far from what is kept."""
    image = drawing(*size)
    expected = PROCESSORS[kind](images=image, return_tensors="pt")["pixel_values"][0]
    found = to_pixels(PROCESSORS[kind], image)
    # Lengths are rounded in the resize, which moves a line of pixels by less than a tenth.
    assert float((found - expected).abs().mean()) < 0.03
    assert found.shape == expected.shape


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (65_535, 1), (1, 65_535), (2, 40_000)])
def test_no_picture_grows_beyond_bounds(kind, size) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 6, size[1] // 2 + 6))
    cropped = crop_thin(image, PROCESSORS[kind])
    if kind != "squash":
        assert max(cropped.size) <= 20 * min(cropped.size) + 128
        assert upright_rgb(cropped).getpixel((cropped.width // 2, cropped.height // 2)) == (0, 0, 255)
    assert to_pixels(PROCESSORS[kind], image).shape == (3, SIDE, SIDE)


PROMPTS = [
    *["Caption of the picture:", "Caption of the picture: ", "Caption:\n", "", " ", "\n", "  What is it?"],
    *[
        "A {eos} b",
        "{eos}",
        "{bos}Caption:",
        "<|user|> Tell. <|assistant|>",
        "Ein Bär: ß",
        "tabs\tand  spaces .",
    ],
    *["😀?", "x" * 300],
]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_become_the_same_ids_everywhere(pictures, tmp_path, kind) -> None:
    build_tokenizer(kind, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    transform = ImageTransform(PROCESSORS["crop"])
    DehvfProcessor(PROCESSORS["crop"], tokenizer, chat_template="{{ messages }}").save_pretrained(
        tmp_path / "processor"
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "processor")
    assert type(processor) is DehvfProcessor
    blank = Sample(key="a", image=None, record={"caption": "A child in a dress."})
    for prompt in PROMPTS:
        prompt = prompt.format(eos=tokenizer.eos_token, bos=tokenizer.bos_token or "")
        row = Collator(tokenizer, transform, task="caption", max_tokens=512, prompt=prompt)([blank])
        first = int((row.labels[0] != IGNORE_INDEX).nonzero()[0])
        trained = row.input_ids[0, :first].tolist()
        questions = open_questions(
            str(pictures / "shards"),
            "coco",
            tokenizer,
            transform,
            prompt=prompt,
            scienceqa=QCM_A,
            caption_tokenizer="simple",
        )
        model: Any = Recorder()
        questions.ask(model, [0])
        ways = {
            "evaluation": model.input_ids[0],
            "generation": Collator(
                tokenizer, transform, task="caption", max_tokens=512, prompt=prompt, for_generation=True
            )([blank]).input_ids[0],
            "processor": processor(text=prompt)["input_ids"][0],
        }
        assert {name: ids.tolist() for name, ids in ways.items()} == dict.fromkeys(ways, trained), repr(
            prompt
        )
        assert trained, "generation begins from something"
        # The whole row ends with one end of text, and the target is all that is supervised.
        ids, labels = encode(tokenizer, prompt, "A child in a dress.", 512)
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        assert ids[:first] == trained
        assert IGNORE_INDEX not in labels[first:]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompts_of_a_batch_are_padded_on_the_left(tmp_path, kind) -> None:
    tokenizer = build_tokenizer(kind, tmp_path)
    processor = DehvfProcessor(PROCESSORS["crop"], tokenizer)
    both = processor(text=["Caption of the picture:", "a"])
    assert both["input_ids"].shape == both["attention_mask"].shape
    for row, prompt in enumerate(["Caption of the picture:", "a"]):
        kept = both["input_ids"][row][both["attention_mask"][row].bool()]
        assert torch.equal(kept, processor(text=prompt)["input_ids"][0])
    assert both["attention_mask"][:, -1].tolist() == [1, 1]
