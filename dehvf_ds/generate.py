"""Describes pictures, or answers questions about them, from the shell.

python dehvf_ds/generate.py --model DIR --image FILE|FOLDER [...] [--prompt TEXT] [--output FILE.jsonl]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import UserError, parse_generate_config
from dehvf_ds.distributed import run_entry
from dehvf_ds.evaluation.generate import generate
from dehvf_ds.model import ModelError


def main(argv: list[str]) -> int:
    """Prints a line for each picture; returns the exit code."""
    config = parse_generate_config(argv)
    try:
        generate(config)
    except ModelError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run_entry(main)
