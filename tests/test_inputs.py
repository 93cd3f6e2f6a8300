"""One way from pictures to pixels and from texts to ids: training, evaluation, generation, processor."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tiny_shards import write_shards
from tiny_tokenizers import TOKENIZERS, build_tokenizer
from transformers import AutoProcessor, BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from dehvf_ds.batch import IGNORE_INDEX, Sample
from dehvf_ds.data.collate import Collator, ImageTransform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import QCM_A
from dehvf_ds.data.shards import ShardRow
from dehvf_ds.evaluation.dataset import open_questions
from dehvf_ds.evaluation.generate import read_picture
from dehvf_ds.model import DehvfProcessor
from dehvf_ds.model import pictures as pictures_module
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
    rgb, alpha, large = drawing(), drawing().convert("L"), drawing(700, 500)
    clear = rgb.copy()
    clear.putalpha(alpha)
    grey16 = np.asarray(alpha).astype(np.uint16) * 200
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 5000)
    found = {f"jpeg_exif{n}": encoded(rgb, "JPEG", **oriented(n)) for n in range(1, 9)}
    return found | {
        "png_exif6": encoded(rgb, **oriented(6)),
        "png_1": encoded(rgb.convert("1")),
        "png_la": encoded(clear.convert("LA")),
        "png_text": encoded(rgb, pnginfo=text),
        "png_palette_alphas": encoded(rgb.quantize(16), transparency=bytes(range(0, 256, 16))),
        "png_rgb_key": encoded(rgb, transparency=rgb.getpixel((5, 5))),
        "png_grey_key": encoded(alpha, transparency=alpha.getpixel((5, 5))),
        "png_16": encoded(Image.fromarray(grey16)),
        "tiff_16_dark": encoded(Image.fromarray(grey16 // 100), "TIFF"),
        "tiff_f": encoded(Image.fromarray(grey16.astype(np.float32) / 51000), "TIFF"),
        "tiff_cmyk_exif": encoded(rgb.convert("CMYK"), "TIFF", **oriented(6)),
        "jpeg_cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg_large_exif8": encoded(drawing(500, 700), "JPEG", **oriented(8)),
        "mpo_large": encoded(large, "MPO", save_all=True, append_images=[drawing(70, 50)]),
        "gif_moving": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "gif_transparent": encoded(rgb.quantize(16), "GIF", transparency=2),
        "webp_rgba": encoded(clear, "WEBP", lossless=True),
        "jp2": encoded(rgb, "JPEG2000"),
        "one_pixel": encoded(drawing(1, 1)),
        "thin": encoded(drawing(1, 300)),
        "thin_odd": encoded(drawing(7, 100), "JPEG", **oriented(6)),
    }


class Recorder:
    """Keeps what a model would be asked."""

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


def evaluated(pictures: Path, rows: Sequence[int], tokenizer, transform, prompt: str) -> Any:
    model: Any = Recorder()
    form: dict[str, Any] = {"prompt": prompt, "scienceqa": QCM_A}
    open_questions(str(pictures / "shards"), "caption", tokenizer, transform, **form).ask(model, rows)
    return model


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_become_the_same_pixels_everywhere(pictures, tmp_path, kind) -> None:
    tokenizer = build_tokenizer("byte_bpe", tmp_path / "tokenizer")
    transform = ImageTransform(PROCESSORS[kind])
    data = odd_pictures()
    names = list(data)
    index = ShardIndex(pictures / "shards")
    collator = Collator(tokenizer, transform, task="caption", max_tokens=16)
    read = [read_sample(index, row, caption=0, shorter_side=SIDE) for row in range(len(names))]
    trained = collator(read).pixel_values
    record = {"caption": ""}
    opened = [read_picture(str(pictures / name), record, transform.image_size) for name in names]
    DehvfProcessor(PROCESSORS[kind], tokenizer).save_pretrained(tmp_path / "processor")
    processor = DehvfProcessor.from_pretrained(tmp_path / "processor")
    streams = [Image.open(io.BytesIO(data[name])) for name in names]
    ways = {
        "evaluation": evaluated(pictures, range(len(names)), tokenizer, transform, "a").asked,
        "generation": collator([sample for sample in opened if isinstance(sample, Sample)]).pixel_values,
        "processor": processor(images=streams)["pixel_values"],
        "processor, by path": processor(images=[str(pictures / name) for name in names])["pixel_values"],
    }
    assert {way: len(found) for way, found in ways.items()} == dict.fromkeys(ways, len(names))
    for number, name in enumerate(names):
        for way, found in ways.items():
            assert torch.equal(found[number], trained[number]), (name, way)
        # Loaded by its owner, in the file's own mode; a large JPEG is then decoded whole.
        image = Image.open(io.BytesIO(data[name]))
        image.load()
        loaded = processor(images=image)["pixel_values"][0]
        torch.testing.assert_close(loaded, trained[number], atol=0.1 if "large" in name else 0, rtol=0)


def test_the_frame_of_an_opened_picture_is_kept(tmp_path) -> None:
    frames = [drawing(700, 500), drawing(700, 500).rotate(180)]
    image = Image.open(io.BytesIO(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])))
    image.seek(1)
    processor = DehvfProcessor(PROCESSORS["squash"], build_tokenizer("byte_bpe", tmp_path))
    found, *expected = processor(images=[image, *reversed(frames)])["pixel_values"]
    assert (found - expected[0]).abs().mean() < 0.1 < (found - expected[1]).abs().mean()
    # The caller's picture stays as it was.
    assert image.tell() == 1
    assert image.size == (700, 500)


ORDINARY = [(48, 40), (40, 160), (32, 32), (31, 33)]
THIN = [(900, 50), (50, 901), (5, 100), (117, 7)]


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [*ORDINARY, *THIN])
def test_pixels_are_what_the_towers_own_processor_makes(kind, size) -> None:
    image = drawing(*size)
    expected = PROCESSORS[kind](images=image, return_tensors="pt")["pixel_values"][0]
    found = to_pixels(PROCESSORS[kind], image)
    assert found.shape == expected.shape
    # Of a thin one the ends are cropped first; lengths are rounded in the resize, which moves lines.
    assert float((found - expected).abs().mean()) <= (0.03 if size in THIN else 0)


@pytest.mark.parametrize("kind", PROCESSORS)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_shortcut_gives_the_processors_bits(kind, width, height, mode, seed) -> None:
    processor = PROCESSORS[kind]
    assert pictures_module._shortcut_of(processor) is not None
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    cropped = crop_thin(upright_rgb(image), processor)
    expected = processor(images=cropped, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(to_pixels(processor, image), expected)


class Darker(CLIPImageProcessorPil):
    """Has CLIP's settings and does something else."""

    def _preprocess(self, images, **settings) -> Any:
        return super()._preprocess([image // 2 for image in images], **settings)


SMALL = {"size": {"shortest_edge": 20}, "crop_size": {"height": SIDE, "width": SIDE}}


@pytest.mark.parametrize(
    ("processor", "has_shortcut"),
    [
        (Darker(**SMALL | {"size": {"shortest_edge": SIDE}}), False),
        (CLIPImageProcessorPil(**SMALL | {"size": {"shortest_edge": SIDE, "longest_edge": 64}}), False),
        (CLIPImageProcessorPil(do_resize=False, crop_size={"height": SIDE, "width": SIDE}), False),
        (CLIPImageProcessorPil(**SMALL), False),
        # Pictures that are smaller than the crop are padded by the processor.
        (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 50}), True),
        (CLIPImageProcessorPil(size={"height": 20, "width": 30}, do_center_crop=False, resample=1), True),
        (SiglipImageProcessorPil(do_rescale=False, do_normalize=False), False),
    ],
    ids=["other code", "two edges", "no resize", "all padded", "some padded", "oblong", "bytes"],
)
def test_a_shortcut_is_taken_only_where_it_is_equal(processor, has_shortcut: bool) -> None:
    assert (pictures_module._shortcut_of(processor) is not None) == has_shortcut
    for size in (40, 30), (100, 120):
        image = drawing(*size)
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(to_pixels(processor, image), expected)


def test_settings_that_change_change_the_pixels() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    before = to_pixels(processor, drawing())
    processor.image_mean = [0.0, 0.0, 0.0]
    after = to_pixels(processor, drawing())
    assert torch.equal(after, processor(images=drawing(), return_tensors="pt")["pixel_values"][0])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(1, 3000), (65_535, 1), (2, 40_000)])
def test_no_picture_grows_beyond_bounds(kind, size) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 6, size[1] // 2 + 6))
    cropped = crop_thin(image, PROCESSORS[kind])
    if kind != "squash":
        assert max(cropped.size) <= 20 * min(cropped.size) + 128
        assert upright_rgb(cropped).getpixel((cropped.width // 2, cropped.height // 2)) == (0, 0, 255)
    assert to_pixels(PROCESSORS[kind], image).shape == (3, SIDE, SIDE)


PROMPTS = [
    *["Caption of the picture: ", "Caption:\n", "", " ", "\n", "  What is it?", "A {eos} b", "{eos}"],
    *["{bos}Caption:", "<|user|> Tell. <|assistant|>", "Ein Bär: ß", "tabs\tand  sp .", "😀?", "x" * 300],
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
    prompts = [text.format(eos=tokenizer.eos_token, bos=tokenizer.bos_token or "") for text in PROMPTS]
    padded = processor(text=prompts)
    for number, prompt in enumerate(prompts):
        collator = Collator(tokenizer, transform, task="caption", max_tokens=512, prompt=prompt)
        row = collator([blank])
        ids, labels = row.input_ids[0].tolist(), row.labels[0].tolist()
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        assert first, "generation begins from something"
        # The whole row ends with one end of text, and the target is all that is supervised.
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        assert IGNORE_INDEX not in labels[first:]
        kept = padded["attention_mask"][number].bool()
        assert kept[-1]
        ways = {
            "evaluation": evaluated(pictures, [0], tokenizer, transform, prompt).input_ids[0],
            "generation": replace(collator, for_generation=True)([blank]).input_ids[0],
            "processor": processor(text=prompt)["input_ids"][0],
            "processor, of a batch": padded["input_ids"][number][kept],
        }
        found = {name: way.tolist() for name, way in ways.items()}
        assert found == dict.fromkeys(ways, ids[:first]), repr(prompt)
