"""Trains DEHVF: parse, resolve, fit.

    deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json [--config RECIPE|FILE] [--train.lr 1e-3 ...]

Also under ``torchrun`` and ``srun``, or alone as ``python dehvf_ds/train.py``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

# As a script: dehvf_ds/ is first on the path, where our modules would shadow other packages.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import ignored_settings, parse_run_config
from dehvf_ds.distributed import connect_ranks, exit_on_signal, on_main, read_world, run_entry
from dehvf_ds.evaluation.in_training import InTrainingEvaluation
from dehvf_ds.planning.estimate import check_evaluation_memory
from dehvf_ds.training.dry_run import dry_run
from dehvf_ds.training.resolve import resolve
from dehvf_ds.training.run_dir import is_finished
from dehvf_ds.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """Runs one training; returns the exit code: 0 finished, 85 stopped on request, to be started again."""
    exit_on_signal()
    config = parse_run_config(argv)
    notes = ignored_settings(config)
    if config.dry_run:
        # Nothing is written, so shards are read without a cache.
        config = replace(config, data=replace(config.data, cache_dir=None))
    world = read_world()
    connect_ranks(world, config.train.start_timeout_minutes)
    run = resolve(config, world)
    if world.is_main:
        for line in [*notes, *run.notes()]:
            print(f"note: {line}", file=sys.stderr, flush=True)
    evaluation = InTrainingEvaluation.of_run(run)
    if on_main(world, lambda: is_finished(config, run.num_steps)):
        if world.is_main:
            note = f"finished already, all {run.num_steps} steps; --overwrite true trains anew"
            print(f"{config.run_dir}: {note}", flush=True)
        return 0
    on_main(world, lambda: check_evaluation_memory(config, run.ds_config, world))
    if config.dry_run:
        return dry_run(run, None if evaluation is None else evaluation.describe)
    return Trainer(run, evaluation).fit()


if __name__ == "__main__":
    run_entry(main, distributed=True)
