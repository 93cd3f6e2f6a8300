"""Looks at what a run needs and names the remedy of what is missing.

    python -m dehvf_ds.doctor [--config RECIPE|FILE]

Exit code 0 where nothing FAILs, 1 otherwise, 2 for wrong flags. Needs the standard library alone, so that a
broken environment gets its report too: everything else is imported by the check that looks at it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn

# Run as a script, dehvf_ds/doctor/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dehvf_ds.doctor import machine, packages
from dehvf_ds.doctor.report import Check, format_line, run_check
from dehvf_ds.doctor.run import recipe_checks


def main(argv: list[str]) -> int:
    """Prints the report, a line as soon as it is known; returns the exit code."""
    parser = _Parser(
        prog="python -m dehvf_ds.doctor",
        description="Looks at what a run needs and names remedies.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a recipe's name or a YAML file: also look at what that run needs")
    recipe = parser.parse_args(argv).config
    failed = False
    # Chained, not listed: which checks follow a recipe is known once it has been read.
    for check in chain(environment_checks(), recipe_checks(recipe) if recipe is not None else ()):
        for line in run_check(check):
            failed |= line.level == "FAIL"
            print(format_line(line), flush=True)
    return int(failed)


def environment_checks() -> Iterator[Check]:
    """What every run needs of the machine and of the Python environment."""
    yield Check("Python", packages.check_python)
    yield Check("packages", packages.check_packages)
    yield Check("torch build", machine.check_torch)
    yield Check("GPUs", machine.check_gpus)
    yield Check("NCCL", machine.check_nccl)
    yield Check("bf16", machine.check_bf16)
    yield Check("deepspeed import", packages.check_deepspeed_import)
    yield Check("Java", machine.check_java)
    yield Check("shared memory", machine.check_shared_memory)
    yield Check("open files", machine.check_open_files)
    yield Check("temporary files", machine.check_temporary_space)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, as the other entries do."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        self.exit(2, f"error: {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
