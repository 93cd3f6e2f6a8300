"""Says what a run will need before it is queued: memory, time and traffic under each DeepSpeed configuration.

    python dehvf_ds/plan.py --config coco_llama13b --gpus-per-node 8 --nodes 2 --gpu H100-80G

Takes the flags of ``train.py`` and those of ``PlanConfig``. Needs no GPU and no weights: the sizes come from
the backbones' configuration files, or are built in for known names without a directory here:
``--model.language_model llama-7b --model.vision_tower clip-vit-l14`` works with any recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import parse_config, parse_run_config, settings_of
from dehvf_ds.distributed import run_entry
from dehvf_ds.planning.estimate import PlanConfig
from dehvf_ds.planning.plan import build_plan, print_plan


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    own, others = split_flags(argv)
    place = parse_plan_config(own)
    print_plan(build_plan(parse_run_config(others), place))
    return 0


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the flags of ``PlanConfig``, written with dashes or underscores, from the run's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in settings_of(PlanConfig):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?")
    helps = [flag for flag in argv if flag in ("-h", "--help")]
    own, others = parser.parse_known_args([flag for flag in argv if flag not in helps])
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in vars(own).items()]
    return [*helps, *flags], others


def parse_plan_config(args: Sequence[str]) -> PlanConfig:
    """Parses the plan's own flags."""
    description = (__doc__ or "").splitlines()[0] + " Takes every flag of train.py, too."
    return parse_config(PlanConfig, args, description)


if __name__ == "__main__":
    run_entry(main)
