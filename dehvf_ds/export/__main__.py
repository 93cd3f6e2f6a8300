"""Exports a run as a Hugging Face model that others load without the trainer.

python tools/merge_adapters.py --checkpoint RUN_DIR|CHECKPOINT --output DIR [--dtype bf16] [--verify]
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError

from dehvf_ds.atomic import atomic_directory
from dehvf_ds.config import UserError, expand_flags, load_run_config
from dehvf_ds.distributed import run_entry
from dehvf_ds.export.card import copy_licence_files, model_card
from dehvf_ds.export.merge import MergedModel, write_model
from dehvf_ds.export.verify import check_memory, read_prompts, verify_export
from dehvf_ds.model import ModelError
from dehvf_ds.model.adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from dehvf_ds.model.adapter import EXPORT_FILE, MANIFEST_FILE, TrainedModel, find_trained, read_manifest
from dehvf_ds.training.run_dir import RUN_CONFIG_FILE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    parser.add_argument("--language-model", help="where the decoder lies now, if it was moved")
    parser.add_argument("--vision-tower", help="where the tower lies now, if it was moved")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    expand_flags(args, "checkpoint", "verify_data", "language_model", "vision_tower")
    if args.adapter_only and (args.dtype or args.no_fold or args.verify):
        parser.error("--adapter-only copies what was trained; --dtype, --no-fold and --verify are of a model")
    if args.verify_rows < 1:
        parser.error("--verify-rows must be at least 1")
    return args


def _size(text: str) -> str:
    split_torch_state_dict_into_shards({}, max_shard_size=text)  # ValueError, which argparse tells
    return text


def _check_output(args: argparse.Namespace, trained: TrainedModel) -> None:
    """Refuses an output that would cover something: --force replaces an earlier export, and nothing else."""
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
        raise UserError(f"--output {output} is in use; name another{remedy}")


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """Yields a hidden directory that becomes ``output`` once it is whole; till then an earlier one stays."""
    try:
        with atomic_directory(output.resolve()) as part:  # a link stays one
            yield part
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--output {output}: not written: {reason}") from None


def _validation_shards(run_dir: Path | None) -> str:
    if run_dir is None:
        raise UserError("--verify: the checkpoint is in no run; name shards with --verify-data")
    data = load_run_config(run_dir / RUN_CONFIG_FILE).data
    return data.val or data.train


def _export(trained: TrainedModel, args: argparse.Namespace) -> None:
    directories = (Path(args.checkpoint), *Path(args.checkpoint).absolute().parents[:3])
    run_dir = next((path for path in directories if (path / RUN_CONFIG_FILE).is_file()), None)
    merged, dtype, prompts = None, None, []
    if not args.adapter_only:
        merged = MergedModel(trained, dtype=DTYPES.get(args.dtype), fold=not args.no_fold)
        dtype = merged.dtype
    if merged and args.verify:
        check_memory(merged.model, merged.dtype)
        prompts = read_prompts(trained, args.verify_data or _validation_shards(run_dir), args.verify_rows)
    form = "adapter" if args.adapter_only else "unfolded" if args.no_fold else "merged"
    card = model_card(trained, run_dir, form=form, dtype=dtype)
    with _written(args.output) as part:
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
    print(f"{args.output}: {form}; its README.md says how to load it")


if __name__ == "__main__":
    run_entry(main)
