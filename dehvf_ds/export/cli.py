"""Exports a run as a Hugging Face model that others load without the trainer.

python tools/merge_adapters.py --checkpoint RUN_DIR|CHECKPOINT --output DIR [--dtype bf16] [--verify]
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from dehvf_ds.config import UserError, expand_flags, load_run_config
from dehvf_ds.export.card import collect_facts, model_card
from dehvf_ds.export.directory import check_output, finished_directory, write_model
from dehvf_ds.export.licences import copy_licence_files
from dehvf_ds.export.pieces import Skeleton, build_skeleton
from dehvf_ds.export.verify import check_memory, read_prompts, verify_export
from dehvf_ds.model import ModelError
from dehvf_ds.model.artifact import MANIFEST_FILE, read_manifest
from dehvf_ds.model.weights import TrainedModel, find_trained

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """Exports one run; returns the exit code.

    Raises:
        UserError: no such run, a base or tensor that does not fit, an output that is in use or too small.
    """
    args = _parse(argv)
    try:
        needed = {"--checkpoint": args.checkpoint, "--verify-data": args.verify_data}
        check_output(args.output, force=args.force, needed=needed)
        trained = find_trained(args.checkpoint, args.language_model, args.vision_tower)
        needed = {
            "what is exported": trained.path,
            "its language model": trained.language_model,
            "its vision tower": trained.vision_tower,
        }
        check_output(args.output, force=args.force, needed=needed)
        if trained.language_model is None:
            raise UserError(f"--checkpoint {args.checkpoint} is merged already")
        if args.adapter_only:
            _export_adapter(trained, args)
        else:
            _export_model(trained, args)
    except ModelError as error:
        raise UserError(str(error)) from None
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exports a run as a Hugging Face model.")
    parser.add_argument("--checkpoint", required=True, help="run directory, checkpoint or adapter artifact")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: the base LLM's own"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file; default: 5GB")
    parser.add_argument("--no-fold", action="store_true", help="keep the FFN adapters apart, in fp32")
    parser.add_argument("--adapter-only", action="store_true", help="only what was trained")
    parser.add_argument("--verify", action="store_true", help="compare the export with the trained model")
    parser.add_argument("--verify-data", help="shards to verify on; default: the run's validation shards")
    parser.add_argument("--verify-rows", type=int, default=8, help="rows to verify on; default: 8")
    parser.add_argument("--language-model", help="where the decoder lies now, if it was moved")
    parser.add_argument("--vision-tower", help="where the tower lies now, if it was moved")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    expand_flags(args, "checkpoint", "verify_data", "language_model", "vision_tower")
    if args.adapter_only and (args.dtype or args.no_fold or args.verify):
        parser.error("--adapter-only copies what was trained; --dtype, --no-fold and --verify are of a model")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=args.max_shard_size)
        amount = float(re.sub(r"[A-Za-z\s]+$", "", args.max_shard_size))
        if not amount > 0:
            raise ValueError
    except ValueError:
        parser.error(f"--max-shard-size {args.max_shard_size} is no size, as 5GB or 500MB")
    if args.verify_rows < 1:
        parser.error("--verify-rows must be at least 1")
    return args


def _export_adapter(trained: TrainedModel, args: argparse.Namespace) -> None:
    facts = collect_facts(trained, _run_dir(args.checkpoint), dtype=None, form="adapter")
    with finished_directory(args.output, force=args.force) as part:
        for name in [*read_manifest(trained.path)["files"], MANIFEST_FILE]:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trained.path / name, part / name)
        (part / "README.md").write_text(model_card(facts), encoding="utf-8")
    print(f"{args.output}: what was trained, fp32; goes onto the base models that it was trained on")


def _export_model(trained: TrainedModel, args: argparse.Namespace) -> None:
    fold = not args.no_fold
    skeleton = build_skeleton(trained, dtype=DTYPES.get(args.dtype), fold=fold)
    dtype = skeleton.dtype
    prompts = _prompts(trained, skeleton, args) if args.verify else []
    facts = collect_facts(
        trained, _run_dir(args.checkpoint), dtype=dtype, form="merged" if fold else "unfolded"
    )
    with finished_directory(args.output, force=args.force) as part:
        (part / "README.md").write_text(model_card(facts), encoding="utf-8")
        for kind in ("language_model", "vision_tower"):
            copy_licence_files(getattr(trained, kind), part / "licences" / kind)
        write_model(part, trained, skeleton, args.max_shard_size)
        del skeleton
        for line in verify_export(trained, part, prompts, dtype=dtype, fold=fold) if prompts else ():
            print(line, flush=True)
    name = str(dtype).removeprefix("torch.")
    print(f"{args.output}: {name}, loads with AutoModelForImageTextToText; see its README.md")


def _prompts(trained: TrainedModel, skeleton: Skeleton, args: argparse.Namespace) -> list:
    run_dir = _run_dir(args.checkpoint)
    data = args.verify_data
    if data is None and run_dir is not None:
        config = load_run_config(run_dir / "config.yaml").data
        data = config.val or config.train
    if data is None:
        raise UserError(f"--verify: {args.checkpoint} is in no run; name shards with --verify-data")
    check_memory(trained, sum(p.numel() for p in skeleton.model.parameters()), skeleton.dtype)
    return read_prompts(trained, data, args.verify_rows)


def _run_dir(checkpoint: str) -> Path | None:
    """The run that a checkpoint or adapter lies in."""
    path = Path(checkpoint)
    for directory in (path, *path.absolute().parents[:3]):
        if (directory / "config.yaml").is_file():
            return directory
    return None
