"""Exports a run: folds its FFN adapters into the frozen weights and writes a Hugging Face directory.

python tools/merge_adapters.py --checkpoint RUN_DIR --output DIR [--dtype bf16|fp16|fp32] [--force]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from dehvf_ds.config import UserError
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import run_entry
from dehvf_ds.model import DehvfProcessor, ModelError
from dehvf_ds.model.weights import find_trained, save_merged

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Merges one run; returns the exit code.

    Raises:
        UserError: no such run, a base that does not fit, or an output that is in use.
    """
    parser = argparse.ArgumentParser(description="Exports a run as a Hugging Face model.")
    parser.add_argument("--checkpoint", required=True, help="run directory or adapter artifact")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the weights; default: the base LLM's"
    )
    parser.add_argument("--language-model", help="where the decoder lies now, if it was moved")
    parser.add_argument("--vision-tower", help="where the tower lies now, if it was moved")
    parser.add_argument("--force", action="store_true", help="replace an output that is not empty")
    args = parser.parse_args(argv)

    output: Path = args.output
    if output.exists() and any(output.iterdir()) and not args.force:
        raise UserError(f"--output {output} is not empty; name another, or pass --force")
    try:
        trained = find_trained(args.checkpoint, args.language_model, args.vision_tower)
        if trained.language_model is None:
            raise UserError(f"--checkpoint {args.checkpoint} is merged already")
        # Folded in fp32 and rounded once.
        model = trained.load("fp32")
        dtype = DTYPES[args.dtype] if args.dtype else trained.base_dtype
        part = output.with_name(output.name + ".partial")
        shutil.rmtree(part, ignore_errors=True)
        save_merged(model, part, dtype)
    except ModelError as error:
        raise UserError(str(error)) from None
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    processor = DehvfProcessor(transform.processor, load_tokenizer(trained.tokenizer_source))
    processor.save_pretrained(part)
    if output.exists():
        shutil.rmtree(output)
    part.rename(output)
    print(f"{output}: {str(dtype).removeprefix('torch.')}, loads with AutoModelForImageTextToText")
    return 0


if __name__ == "__main__":
    run_entry(main)
