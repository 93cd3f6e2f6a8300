"""What an export proves: the processor asks as in training, folding changed nothing, the files hold it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.data.collate import Collator, build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import CAPTION_PROMPT, Task
from dehvf_ds.model import DehvfForConditionalGeneration, DehvfProcessor
from dehvf_ds.model.adapter import TrainedModel
from dehvf_ds.model.ffn import fold_lora

FOLD_TOLERANCE = 1e-5
"""What folding in fp32 may change in a logit, as a share of the largest."""

_COMPARED_TOKENS = 40
"""Longest answer that is compared, whatever the task."""

Answer = tuple[Tensor, Tensor]
"""Ids of prompt and greedy answer, ``[1, tokens]``; fp32 logits."""


def read_prompts(trained: TrainedModel, data: str, num_rows: int) -> list[Batch]:
    """Prompts as ``trained`` was trained with, a batch each, of rows spread evenly over the shards."""
    index, task = ShardIndex(data), cast(Task, trained.task or "caption")
    collator = Collator(
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        task=task,
        max_tokens=512,
        prompt=trained.config.prompt,
        for_generation=True,
    )
    num_rows, side = min(num_rows, len(index)), collator.image_size
    rows = (len(index) * i // num_rows for i in range(num_rows))
    return [collator([read_sample(index, row, shorter_side=side, task=task)]) for row in rows]


def check_memory(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Refuses to verify a model that does not fit in memory, in fp32 and beside it in ``dtype``."""
    needed = sum(p.numel() for p in model.parameters()) * (4 + dtype.itemsize)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--verify holds the model in fp32 and its export beside it, {needed / 1e9:.0f} GB; "
            f"{free / 1e9:.0f} GB are free. Export without it, or on a larger machine"
        )


def verify_export(
    trained: TrainedModel, directory: Path, prompts: Sequence[Batch], *, dtype: torch.dtype, fold: bool
) -> None:
    """Compares an export with the model that it was made of, on the CPU; prints what it finds."""
    model = trained.load("fp32")
    before = _ask(model, prompts)
    known = [ids for ids, _ in before]
    if fold:
        fold_lora(model)
        share, text = _compare(before, _ask(model, prompts, known))
        print(f"fp32 fold: {text}; {FOLD_TOLERANCE:g} of the largest logit allowed", flush=True)
        if not share <= FOLD_TOLERANCE:
            raise UserError(f"not exported: folding changes the logits by {share:.1e} of the largest")
    exported: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
    wanted, found = model.state_dict(), exported.state_dict()
    wrong = wanted.keys() ^ found.keys()
    for name in wanted.keys() & found.keys():
        tensor = wanted[name].to(dtype) if wanted[name].is_floating_point() else wanted[name]
        wrong |= set() if torch.equal(tensor, found[name]) else {name}
    if wrong:
        raise UserError(
            f"not exported: {len(wrong)} tensors are not the trained ones, {min(wrong)} among them"
        )
    name, kind = str(dtype).removeprefix("torch."), "fold" if fold else "model"
    print(f"files: all {len(found)} tensors equal the fp32 {kind}, rounded to {name}", flush=True)
    if dtype != torch.float32:
        print(f"{name}: {_compare(before, _ask(exported, prompts, known))[1]}", flush=True)


def check_processor(processor: DehvfProcessor, directory: Path, prompt: str | None) -> None:
    """Refuses a processor that, saved and loaded again, makes other ids or pixels than in training."""
    loaded = DehvfProcessor.from_pretrained(directory)
    eos = processor.tokenizer.eos_token
    for text in (prompt or CAPTION_PROMPT, "", "What is it?\n", f"Options: (A) a (B) b {eos} Response:", eos):
        ids, found = (each(text=text)["input_ids"].tolist() for each in (processor, loaded))
        if ids != found:
            raise UserError(
                f"not exported: the tokenizer, saved and loaded again, makes other ids of {text!r}: "
                f"{found[0][:8]}, not {ids[0][:8]}"
            )
    for size in ((40, 30), (30, 400)):
        picture = Image.radial_gradient("L").resize(size).convert("RGBA")
        pixels, found = (each(images=picture)["pixel_values"] for each in (processor, loaded))
        if not torch.equal(pixels, found):
            raise UserError("not exported: the image processor, saved and loaded again, makes other pixels")


def _compare(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[float, str]:
    """The largest difference of two models' logits, as a share of the largest, and what to say of them."""
    pairs = [(a, b) for (_, a), (_, b) in zip(before, after, strict=True)]
    # A maximum of tensors, so that one NaN makes it NaN.
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    share = float(difference / torch.stack([a.abs().max() for a, _ in pairs]).max())
    likeliest = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    same = sum(torch.equal(ids, other) for (ids, _), (other, _) in zip(before, after, strict=True))
    return share, (
        f"logits differ by at most {share:.1e} of the largest; the likeliest token is the same at "
        f"{int(likeliest.sum())} of {len(likeliest)} positions, the answer for {same} of {len(pairs)} rows"
    )


@torch.inference_mode()
def _ask(
    model: DehvfForConditionalGeneration, prompts: Sequence[Batch], known: Sequence[Tensor] | None = None
) -> list[Answer]:
    """Answers every prompt; the logits are of ``known`` ids, so that models compare, or of its own answer."""
    answers = []
    for number, prompt in enumerate(prompts):
        given = prompt.to(model.device, model.dtype)
        new_ids = model.generate(
            given.input_ids,
            given.pixel_values,
            given.has_image,
            attention_mask=given.attention_mask,
            do_sample=False,
            max_new_tokens=_COMPARED_TOKENS,
        )
        ids = torch.cat([given.input_ids, new_ids], dim=1)
        asked = known[number] if known is not None else ids
        output = model(input_ids=asked, pixel_values=given.pixel_values, has_image=given.has_image)
        answers.append((ids, output.logits.float()))
    return answers
