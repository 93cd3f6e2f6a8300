"""Exports a run as a Hugging Face model that others load without the trainer.

python tools/merge_adapters.py --checkpoint RUN_DIR|CHECKPOINT --output DIR [--dtype bf16] [--verify]
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dehvf_ds.atomic import atomic_directory
from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError, expand_flags, load_run_config
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.distributed import run_entry
from dehvf_ds.evaluation.generate import prompt_collator
from dehvf_ds.export.card import copy_licence_files, model_card
from dehvf_ds.export.merge import MergedModel, write_model
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from dehvf_ds.model.adapter import EXPORT_FILE, MANIFEST_FILE, TrainedModel, find_trained, read_manifest
from dehvf_ds.model.ffn import fold_lora
from dehvf_ds.training.run_dir import RUN_CONFIG_FILE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FOLD_TOLERANCE = 1e-5
"""What folding in fp32 may change in a logit, as a share of the largest."""

COMPARED_TOKENS = 40
"""Longest answer that ``--verify`` compares, whatever the task."""

Answer = tuple[Tensor, Tensor]
"""Ids of prompt and greedy answer, ``[1, tokens]``; fp32 logits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exports one run; returns the exit code."""
    args = _parse(argv)
    try:
        trained = find_trained(args.checkpoint, args.language_model, args.vision_tower)
        _check_output(args, trained)
        _export(trained, args)
    except ModelError as error:
        raise UserError(str(error)) from None
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exports a run as a Hugging Face model.")
    parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint or adapter artifact")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights; default: the decoder's own")
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", help="largest weight file, as 500MB; default: 5GB"
    )
    parser.add_argument("--no-fold", action="store_true", help="keep the FFN adapters apart, in fp32")
    parser.add_argument("--adapter-only", action="store_true", help="only what was trained")
    parser.add_argument("--verify", action="store_true", help="compare the export with the trained model")
    parser.add_argument("--verify-data", help="shards to verify on; default: the run's validation shards")
    parser.add_argument("--verify-rows", type=int, default=8, help="rows to verify on; default: 8")
    parser.add_argument("--language-model", help="where the decoder is now, if it was moved")
    parser.add_argument("--vision-tower", help="where the tower is now, if it was moved")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    expand_flags(args, "checkpoint", "verify_data", "language_model", "vision_tower")
    if args.adapter_only and (args.dtype or args.no_fold or args.verify):
        parser.error("--adapter-only copies what was trained; --dtype, --no-fold and --verify need a model")
    if args.verify_rows < 1:
        parser.error("--verify-rows must be at least 1")
    return args


def _size(text: str) -> str:
    split_torch_state_dict_into_shards({}, max_shard_size=text)  # argparse reports its ValueError
    return text


def _check_output(args: argparse.Namespace, trained: TrainedModel) -> None:
    """Refuses an output that would replace anything but, with --force, an earlier export."""
    output: Path = args.output
    needed = {
        "--checkpoint": args.checkpoint,
        "what is exported": trained.path,
        "--verify-data": args.verify_data,
        "the language model": trained.language_model,
        "the vision tower": trained.vision_tower,
        "the working directory": ".",
        "the home directory": os.path.expanduser("~"),  # noqa: PTH111 - Path.home() fails if there is none
    }
    for name, path in needed.items():
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output {output} is or holds {name} ({path}); name another")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    # A model with its record, or an adapter with its card.
    marks = ([EXPORT_FILE], [ADAPTER_CONFIG_FILE, "README.md"])
    is_export = any(all((output / name).is_file() for name in names) for names in marks)
    if not (args.force and is_export):
        remedy = ", or pass --force to replace this export" if is_export else "; it holds no earlier export"
        raise UserError(f"--output {output} already exists; name another{remedy}")


def _export(trained: TrainedModel, args: argparse.Namespace) -> None:
    directories = (Path(args.checkpoint), *Path(args.checkpoint).absolute().parents[:3])
    run_dir = next((path for path in directories if (path / RUN_CONFIG_FILE).is_file()), None)
    merged, dtype, prompts = None, None, []
    if not args.adapter_only:
        merged = MergedModel(trained, dtype=DTYPES.get(args.dtype), fold=not args.no_fold)
        dtype = merged.dtype
    if merged and args.verify:
        _check_memory(merged)
        prompts = read_prompts(trained, args.verify_data or _validation_shards(run_dir), args.verify_rows)
    form = "adapter" if args.adapter_only else "unfolded" if args.no_fold else "merged"
    card = model_card(trained, run_dir, form=form, dtype=dtype)
    try:
        # Resolved: a link stays one.
        with atomic_directory(args.output.resolve()) as part:
            (part / "README.md").write_text(card, encoding="utf-8")
            if merged is None:
                for name in [*read_manifest(trained.path)["files"], MANIFEST_FILE]:
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(trained.path / name, part / name)
            else:
                copy_licence_files(trained, part / "licences")
                write_model(part, trained, merged, args.max_shard_size)
                merged = None
            if dtype and prompts:
                verify_export(trained, part, prompts, dtype=dtype, fold=not args.no_fold)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--output {args.output}: not written: {reason}") from None
    print(f"{args.output}: {form}; its README.md says how to load it")


# --- what --verify compares ---


def _validation_shards(run_dir: Path | None) -> str:
    if run_dir is None:
        raise UserError("--verify: the checkpoint is in no run; name shards with --verify-data")
    data = load_run_config(run_dir / RUN_CONFIG_FILE).data
    return data.val or data.train


def _check_memory(merged: MergedModel) -> None:
    """Refuses to verify a model that does not fit in memory in fp32, with its export beside it."""
    needed = sum(p.numel() for p in merged.model.parameters()) * (4 + merged.dtype.itemsize)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--verify holds the model in fp32 and its export beside it, {needed / 1e9:.0f} GB; "
            f"{free / 1e9:.0f} GB are free. Export without it, or on a larger machine"
        )


def read_prompts(trained: TrainedModel, data: str, num_rows: int) -> list[Batch]:
    """Prompts in the form of the model's training, a batch each, from rows spread evenly over the shards."""
    index, collator = ShardIndex(data), prompt_collator(trained)
    num_rows, form = min(num_rows, len(index)), {"shorter_side": collator.image_size, "task": collator.task}
    rows = (len(index) * i // num_rows for i in range(num_rows))
    return [collator([read_sample(index, row, **form)]) for row in rows]


def verify_export(
    trained: TrainedModel, directory: Path, prompts: Sequence[Batch], *, dtype: torch.dtype, fold: bool
) -> None:
    """Compares an export with the trained model, on the CPU, and prints how far they differ."""
    model = trained.load("fp32")
    before = _answer(model, prompts)
    known = [ids for ids, _ in before]
    if fold:
        fold_lora(model)
        share, text = _compare(before, _answer(model, prompts, known))
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
        raise UserError(f"not exported: {len(wrong)} tensors differ from the trained ones, as {min(wrong)}")
    name, kind = str(dtype).removeprefix("torch."), "fold" if fold else "model"
    print(f"files: all {len(found)} tensors equal the fp32 {kind}, rounded to {name}", flush=True)
    if dtype != torch.float32:
        print(f"{name}: {_compare(before, _answer(exported, prompts, known))[1]}", flush=True)


@torch.inference_mode()
def _answer(
    model: DehvfForConditionalGeneration, prompts: Sequence[Batch], known: Sequence[Tensor] | None = None
) -> list[Answer]:
    """Answers every prompt; the logits are those of ``known`` ids, to compare models, or of the answer."""
    answers = []
    for number, prompt in enumerate(prompts):
        moved = prompt.to(model.device, model.dtype)
        new_ids = model.generate(
            moved.input_ids,
            moved.pixel_values,
            moved.has_image,
            picture=moved.picture,
            attention_mask=moved.attention_mask,
            do_sample=False,
            max_new_tokens=COMPARED_TOKENS,
        )
        ids = torch.cat([moved.input_ids, new_ids], dim=1)
        scored = known[number] if known is not None else ids
        output = model(
            input_ids=scored,
            pixel_values=moved.pixel_values,
            has_image=moved.has_image,
            picture=moved.picture,
        )
        answers.append((ids, output.logits.float()))
    return answers


def _compare(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[float, str]:
    """The largest difference of two models' logits, as a share of the largest logit; and that in words."""
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


if __name__ == "__main__":
    run_entry(main)
