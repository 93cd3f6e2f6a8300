"""The proof of an export: that folding changed nothing, that the files hold it, what the dtype changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.samples import read_sample
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.adapters import fold_lora
from dehvf_ds.model.weights import TrainedModel

FOLD_TOLERANCE = 1e-5
"""What folding in fp32 may change in a logit, as a share of the largest."""

MAX_NEW_TOKENS = 40


def read_prompts(trained: TrainedModel, data: str, num_rows: int) -> list[Batch]:
    """Prompts of rows that are spread evenly over shards, a batch each.

    Args:
        trained: gives task, prompt, tokenizer and image processor.
        data: directory of shards.
        num_rows: how many.

    Raises:
        UserError: there are no such shards, or their rows are of another task.
    """
    index = ShardIndex(data)
    task = trained.task or "caption"
    captioned = len(index) - index.num_without_captions
    if captioned if task != "caption" else index.num_without_captions:
        raise UserError(f"{data}: its rows are of another task than the model's, {task}")
    collator = Collator(
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        task=task,  # pyright: ignore[reportArgumentType]
        max_tokens=512,
        prompt=trained.config.prompt,
        for_generation=True,
    )
    num_rows, side = min(num_rows, len(index)), collator.image_size
    chosen = (len(index) * i // num_rows for i in range(num_rows))
    return [collator([read_sample(index, row, shorter_side=side)]) for row in chosen]


def verify_export(
    trained: TrainedModel, directory: Path, prompts: Sequence[Batch], *, dtype: torch.dtype, fold: bool
) -> Iterator[str]:
    """Compares an export with the model that it was made of; yields what was found, a line each.

    The trained model is held in fp32 on the CPU, and beside it the exported one in its dtype: 4 bytes a
    parameter and 2 or 4 more.

    Args:
        trained: the model before.
        directory: the export.
        prompts: what both are asked.
        dtype: of the export.
        fold: whether the adapters were folded.

    Raises:
        UserError: there is too little memory, folding changes the logits by more than ``FOLD_TOLERANCE``, or
            the files hold something else.
    """
    model = trained.load("fp32")
    before = _ask(model, prompts)
    known = [ids for ids, _ in before]
    if fold:
        fold_lora(model)
        after = _ask(model, prompts, known)
        share = _largest_difference(before, after) / _largest(before)
        yield (
            f"fp32 fold: logits differ by at most {share:.1e} of the largest ({FOLD_TOLERANCE:g} allowed); "
            f"{same_answers(before, after)}"
        )
        if not share <= FOLD_TOLERANCE:
            raise UserError(f"not exported: folding changes the logits by {share:.1e} of the largest")
    exported: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval()
    wrong = _differing_tensors(model, exported, dtype)
    if wrong:
        raise UserError(f"not exported: {len(wrong)} tensors are not the trained ones, {wrong[0]} among them")
    name = str(dtype).removeprefix("torch.")
    kind = "fold" if fold else "model"
    yield f"files: all {len(exported.state_dict())} tensors equal the fp32 {kind}, rounded to {name}"
    if dtype == torch.float32:
        return
    del model
    rounded = _ask(exported, prompts, known)
    share = _largest_difference(before, rounded) / _largest(before)
    yield (
        f"{name}: logits differ by at most {share:.1e} of the largest; {_same_choices(before, rounded)}; "
        f"{same_answers(before, rounded)}"
    )


def check_memory(trained: TrainedModel, num_parameters: int, dtype: torch.dtype) -> None:
    """Refuses to verify a model that the memory does not hold.

    Raises:
        UserError: it does not.
    """
    needed = num_parameters * (4 + dtype.itemsize)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--verify holds {trained.path} in fp32 and its export beside it, {needed / 1e9:.0f} GB; "
            f"{free / 1e9:.0f} GB are free. Export without it, or on a larger machine"
        )


Answer = tuple[Tensor, Tensor]
"""Ids of prompt and greedy answer; logits of the asked ids, fp32."""


@torch.inference_mode()
def _ask(
    model: DehvfForConditionalGeneration, prompts: Sequence[Batch], known: Sequence[Tensor] | None = None
) -> list[Answer]:
    """Answers every prompt; the logits are those of ``known`` ids where given, so that models compare."""
    answers = []
    for number, prompt in enumerate(prompts):
        given = prompt.to(model.device, model.dtype)
        new_ids = model.generate(
            given.input_ids,
            given.pixel_values,
            given.has_image,
            attention_mask=given.attention_mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        ids = torch.cat([given.input_ids, new_ids], dim=1)
        asked = known[number] if known is not None else ids
        output = model(input_ids=asked, pixel_values=given.pixel_values, has_image=given.has_image)
        answers.append((ids, output.logits.float()))
    return answers


def _largest_difference(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    return max(float((a - b).abs().max()) for (_, a), (_, b) in zip(before, after, strict=True))


def _largest(answers: Sequence[Answer]) -> float:
    return max(float(logits.abs().max()) for _, logits in answers)


def _same_choices(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    pairs = [(a.argmax(-1) == b.argmax(-1)) for (_, a), (_, b) in zip(before, after, strict=True)]
    same, every = sum(int(p.sum()) for p in pairs), sum(p.numel() for p in pairs)
    return f"the likeliest token is the same at {same} of {every} positions"


def same_answers(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    """How many answers agree, and how many of the others part at a near-tie.

    There the first model prefers its own token to the second's by at most twice the largest difference of
    their logits: rounding alone decides.
    """
    noise = 2 * _largest_difference(before, after)
    differing = [
        margin_where_they_part(a, b)
        for a, b in zip(before, after, strict=True)
        if not torch.equal(a[0], b[0])
    ]
    text = f"{len(before) - len(differing)} of {len(before)} greedy answers are the same"
    near_ties = sum(margin <= noise for margin in differing)
    return f"{text} ({near_ties} near-ties among the others)" if differing else text


def margin_where_they_part(before: Answer, after: Answer) -> float:
    """By how much the first model prefers its token to the second's, in logits, at the first other token."""
    (ids, logits), (other_ids, _) = before, after
    length = min(ids.shape[1], other_ids.shape[1])
    parts = (ids[0, :length] != other_ids[0, :length]).nonzero()
    if not len(parts):
        return float("inf")  # one ended where the other went on
    position = int(parts[0])
    chosen, other = logits[0, position - 1, [int(ids[0, position]), int(other_ids[0, position])]]
    return float(chosen - other)


def _differing_tensors(
    model: DehvfForConditionalGeneration, exported: DehvfForConditionalGeneration, dtype: torch.dtype
) -> list[str]:
    """Names of the tensors that are not the model's own rounded to the dtype."""
    wanted, found = model.state_dict(), exported.state_dict()
    wrong = wanted.keys() ^ found.keys()
    for name in wanted.keys() & found.keys():
        tensor = wanted[name]
        rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.equal(rounded, found[name]):
            wrong.add(name)
    return sorted(wrong)
