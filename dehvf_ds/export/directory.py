"""The directory of an exported model: complete under its name, or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from dehvf_ds import __version__
from dehvf_ds.atomic import flush_to_disk
from dehvf_ds.config import UserError
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.export.pieces import Piece, Skeleton
from dehvf_ds.export.shards import write_shards
from dehvf_ds.export.templates import export_template
from dehvf_ds.model import DehvfProcessor
from dehvf_ds.model.artifact import CONFIG_FILE as ADAPTER_CONFIG_FILE
from dehvf_ds.model.stored import StoredFile
from dehvf_ds.model.weights import EXPORT_FILE, TrainedModel

MAX_NEW_TOKENS = {"caption": 40, "scienceqa": 8, "chat": 256}
"""Longest answer by task, where whoever generates names none."""


@contextmanager
def finished_directory(output: Path, *, force: bool) -> Iterator[Path]:
    """Yields a hidden directory beside ``output`` that gets its name when the block ends without an error.

    Args:
        output: is not there, or empty, or, with ``force``, an earlier export, which stays until the new one
            is whole.
        force: replaces an earlier export.

    Raises:
        UserError: the output is in use or cannot be written.
    """
    check_output(output, force=force)
    output = output.resolve()  # a link stays one
    part = output.with_name(f".{output.name}.part")
    old = output.with_name(f".{output.name}.old")
    try:
        for leftover in (part, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            flush_to_disk(path)
        if output.exists():
            output.rename(old)
        part.rename(output)
        flush_to_disk(output.absolute().parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--output {output}: not written: {reason}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_output(output: Path, *, force: bool, needed: Mapping[str, str | Path | None] | None = None) -> None:
    """Refuses an output that would cover something.

    Args:
        output: what is to be written.
        force: replaces an earlier export.
        needed: what must not be replaced, by what the message calls it; hub ids and None are no paths.

    Raises:
        UserError: it is a file, not empty without ``force``, or with it no earlier export, or holds what is
            needed.
    """
    try:
        place = output.resolve()
        output.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise UserError(f"--output {output}: {getattr(error, 'strerror', None) or error}") from None
    for name, path in {
        "the working directory": ".",
        "the home directory": _home(),
        **(needed or {}),
    }.items():
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(place):
            raise UserError(f"--output {output} is or holds {name} ({path}); name another")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; name a directory")
    if not any(output.iterdir()):
        return
    if not force:
        raise UserError(f"--output {output} is not empty; name another, or pass --force to replace an export")
    if not _is_export(output):
        raise UserError(
            f"--output {output} holds no earlier export, so --force does not replace it; remove it yourself"
        )


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # a container's user may have none
        return None


def _is_export(output: Path) -> bool:
    """Whether an export lies there: a model with its record, or an adapter with its card."""
    return (output / EXPORT_FILE).is_file() or all(
        (output / name).is_file() for name in (ADAPTER_CONFIG_FILE, "README.md")
    )


def write_model(part: Path, trained: TrainedModel, skeleton: Skeleton, max_shard_size: str) -> None:
    """Writes a Hugging Face model directory: weights, code, configurations, processor, tokenizer.

    ``config.json``, without which nothing loads the directory, comes last but for the record of all files.

    Args:
        part: an empty directory.
        trained: where the processors lie.
        skeleton: the model.
        max_shard_size: as ``5GB``.

    Raises:
        ModelError: a weight is missing or damaged.
        UserError: the disk has too little room, or the processors cannot be read.
    """
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    pieces = skeleton.decoder_pieces()
    small = skeleton.small_tensors()
    # Half as much again for the small tensors, which are written twice.
    needed = sum(torch.empty(p.shape, dtype=p.dtype, device="meta").nbytes for p in pieces)
    needed += 2 * sum(tensor.nbytes for tensor in small.values())
    free = shutil.disk_usage(part).free
    if needed > free:
        raise UserError(f"--output needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")

    model = skeleton.model
    model.generation_config = _generation_config(trained, tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
    # transformers names the tower's tensors as hubs do, and writes configurations and code.
    model.save_pretrained(part, state_dict=small, max_shard_size="1TB")
    config = json.loads((part / CONFIG_NAME).read_text(encoding="utf-8"))
    config["dtype"] = str(skeleton.dtype).removeprefix(
        "torch."
    )  # it looks at the decoder, which is not there
    (part / CONFIG_NAME).unlink()
    with _small_pieces(part) as rest:
        files = write_shards(part, [*pieces, *rest], max_shard_size)
    skeleton.files.close()

    template = export_template(tokenizer, trained.task)
    tokenizer.chat_template = None  # both would be written to one file
    processor = DehvfProcessor(
        transform.processor, tokenizer, chat_template=template, written_prompts=trained.task == "chat"
    )
    processor.save_pretrained(part)
    _check_processor(part, processor, trained.config.prompt)
    (part / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    record = {
        "format": 1,
        "dehvf_ds": __version__,
        "adapters": "folded" if skeleton.fold else "apart",
        "task": trained.task,
        "files": files,
    }
    (part / EXPORT_FILE).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")


@contextmanager
def _small_pieces(part: Path) -> Iterator[list[Piece]]:
    """The tensors that ``save_pretrained`` wrote, as pieces; their file is gone afterwards."""
    path = part / "model.safetensors"
    if not path.exists():
        yield []
        return
    path = path.rename(part / ".small.safetensors")
    with StoredFile(path) as file:
        yield [
            Piece(name, stored.shape, stored.dtype, lambda name=name: file.read(name))
            for name, stored in file.tensors.items()
        ]
    path.unlink()


def _check_processor(part: Path, processor: DehvfProcessor, prompt: str | None) -> None:
    """Refuses a processor that, loaded again, would ask otherwise than the model was trained.

    Raises:
        UserError: its ids or its pixels differ.
    """
    loaded = DehvfProcessor.from_pretrained(part)
    eos = processor.tokenizer.eos_token
    for text in (prompt or CAPTION_PROMPT, "", "What is it?\n", f"Options: (A) a (B) b {eos} Response:", eos):
        ids, found = (each(text=text)["input_ids"].tolist() for each in (processor, loaded))
        if ids != found:
            raise UserError(
                f"not exported: the tokenizer makes other ids of {text!r} once it is saved and loaded again, "
                f"{found[0][:8]} in the place of {ids[0][:8]}"
            )
    for size in ((40, 30), (30, 400)):
        picture = Image.radial_gradient("L").resize(size).convert("RGBA")
        pixels, found = (each(images=picture)["pixel_values"] for each in (processor, loaded))
        if not torch.equal(pixels, found):
            raise UserError("not exported: the image processor, saved and loaded again, makes other pixels")


def _generation_config(trained: TrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, as models are evaluated; ends at the tokenizer's end of text and at the decoder's own ends."""
    ends: list[Any] = [tokenizer.eos_token_id]
    with contextlib.suppress(OSError):
        own: Any = GenerationConfig.from_pretrained(trained.tokenizer_source).eos_token_id
        ends += own if isinstance(own, list) else [own]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS[trained.task or "caption"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
