"""Checks whether this machine is ready for a run, and names remedies.

    python -m dehvf_ds.doctor [--config RECIPE|FILE]

Exit code 0 if nothing FAILs, 1 otherwise, 2 for wrong flags. It starts in a broken environment, too. PyTorch
and DeepSpeed have their own reports: torch.utils.collect_env, ds_report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# As a script: dehvf_ds/ is first on the path, where our modules would shadow other packages.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.cluster.environment import environment_checks, recipe_checks, run_check


def main(argv: list[str]) -> int:
    """Prints the report, a line as soon as it is known; returns the exit code."""
    description = "Checks whether this machine is ready for a run, and names remedies."
    parser = argparse.ArgumentParser("python -m dehvf_ds.doctor", description=description, allow_abbrev=False)
    parser.add_argument("--config", help="a recipe's name or a YAML file: also check that run's files")
    recipe = parser.parse_args(argv).config
    failed = False
    for checks in (environment_checks(), recipe_checks(recipe) if recipe is not None else ()):
        for check in checks:
            for line in run_check(check):
                failed |= line.level == "FAIL"
                print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
