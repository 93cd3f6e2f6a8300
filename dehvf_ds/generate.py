"""Describes pictures, or answers about them, from the shell.

python dehvf_ds/generate.py --model DIR --image FILE|FOLDER [...] [--prompt TEXT] [--output FILE.jsonl]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import GenerateConfig, UserError, parse_generate_config
from dehvf_ds.distributed import run_entry
from dehvf_ds.evaluation.generate import generate
from dehvf_ds.model import ModelError

# Flags that take all that follows them up to the next flag.
_LISTS = ("--image", "--choices")


def main(argv: list[str]) -> int:
    """Prints a line a picture; returns the exit code."""
    config = parse_flags(argv)
    try:
        generate(config)
    except ModelError as error:
        raise UserError(str(error)) from None
    return 0


def parse_flags(argv: list[str]) -> GenerateConfig:
    """As ``parse_generate_config``; ``--image a b c`` stands for a list, each word as it is."""
    words: list[str] = []
    flag = None
    for word in argv:
        name, equals, value = word.partition("=")
        if name in _LISTS:
            flag = name
            words += [f"{flag}+={value}"] if equals else []
        elif word.startswith("--"):
            flag = None
            words.append(word)
        else:
            words.append(word if flag is None else f"{flag}+={word}")
    return parse_generate_config(words)


if __name__ == "__main__":
    run_entry(main)
