"""Says what a run will need before it is queued: memory, time and traffic under each DeepSpeed configuration.

    python dehvf_ds/plan.py --config coco_llama13b --gpus-per-node 8 --nodes 2 --gpu H100-80G

Takes the flags of ``train.py`` and those of ``PlanConfig``. Needs no GPU and no weights: backbones are
counted from their configuration files, or from built-in sizes where a name is known and no directory of that
name is here: ``--model.language_model llama-7b --model.vision_tower clip-vit-l14`` works over any recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import parse_config, parse_run_config, settings_of
from dehvf_ds.distributed import run_entry
from dehvf_ds.planning.plan import build_plan, print_plan
from dehvf_ds.planning.time import PlanConfig


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    own, others = split_flags(argv)
    place = parse_plan_config(own)
    print_plan(build_plan(parse_run_config(others), place))
    return 0


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the flags of ``PlanConfig``, written with dashes or underscores, from the run's."""
    names = settings_of(PlanConfig)
    own, others = [], []
    rest = iter(argv)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if arg in ("-h", "--help"):
            own.append(arg)
        elif not flag.startswith("--") or name not in names:
            others.append(arg)
        elif equals:
            own.append(f"--{name}={value}")
        else:
            own += [f"--{name}", *[value for value in [next(rest, None)] if value is not None]]
    return own, others


def parse_plan_config(args: Sequence[str]) -> PlanConfig:
    """Parses the plan's own flags."""
    description = (__doc__ or "").splitlines()[0] + " Every flag of train.py is taken too."
    return parse_config(PlanConfig, args, description)


if __name__ == "__main__":
    run_entry(main)
