"""Evaluates a trained model on shards: answers, scores and example pictures.

    python dehvf_ds/eval.py --model RUN_DIR --data SHARDS [--task caption|scienceqa] [--split test]
    python dehvf_ds/eval.py --model RUN_DIR --data ScienceQA --task scienceqa --split test

Under ``deepspeed``, ``torchrun`` or ``srun`` every rank holds the full model and answers its own rows. If an
evaluation is killed, the same command resumes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import UserError, parse_eval_config
from dehvf_ds.distributed import exit_on_signal, run_entry
from dehvf_ds.evaluation.evaluate import evaluate
from dehvf_ds.model import ModelError


def main(argv: list[str]) -> int:
    """Runs one evaluation; returns the exit code."""
    # Predictions are cached as they come.
    exit_on_signal()
    config = parse_eval_config(argv)
    try:
        evaluate(config)
    except ModelError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run_entry(main, distributed=True)
