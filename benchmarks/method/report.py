"""Tables and plots of what `sweep.py` has run so far.

    python benchmarks/method/report.py [--plots DIR]

Prints, for every task and number of steps: the learning rates tried, the arms' means over seeds, and how far
each is from the first arm, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arms import read_arm
from sweep import RESULTS
from tasks import TASKS, Task

Run = dict[str, Any]


def main() -> None:
    """Prints the tables, draws the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))]
    for name, task in TASKS.items():
        for steps in sorted({run["steps"] for run in runs if run["task"] == name}):
            chosen = [run for run in runs if run["task"] == name and run["steps"] == steps]
            print(f"\n## {name}, {steps} steps\n")
            print("\n".join(rates(chosen)), end="\n\n")
            print("\n".join(arms(task, chosen)))


def rates(runs: Sequence[Run]) -> Iterator[str]:
    """Loss a token on the validation split, with seed 0, by arm and learning rate."""
    tried = sorted({run["lr"] for run in runs if run["split"] == "val"})
    yield "| validation loss, seed 0 | " + " | ".join(f"{lr:g}" for lr in tried) + " |"
    yield "|---|" + "---|" * len(tried)
    for name in names(runs):
        found = {run["lr"]: run["loss"] for run in runs if run["arm"] == name and run["split"] == "val"}
        yield f"| {name} | " + " | ".join(f"{found[lr]:.3f}" if lr in found else "" for lr in tried) + " |"


def arms(task: Task, runs: Sequence[Run]) -> Iterator[str]:
    """Means and standard deviations over seeds, on the test split."""
    columns = ("loss", *task.columns)
    yield "| arm | seeds | lr | trained | CPU s a step | " + " | ".join(columns) + " |"
    yield "|---|---|---|---|---|" + "---|" * len(columns)
    for name in names(runs):
        found = [run for run in runs if run["arm"] == name and run["split"] == "test"]
        if found:
            head = [name, len(found), f"{found[0]['lr']:g}", f"{found[0]['trained'] / 1e6:.2f} M"]
            head.append(f"{statistics.median(run['step_cpu_s'] for run in found):.2f}")
            cells = [*map(str, head), *(spread([run[column] for run in found]) for column in columns)]
            yield "| " + " | ".join(cells) + " |"
    yield ""
    for name in names(runs):
        yield f"- `{name}`: {read_arm(name).about}"


def names(runs: Sequence[Run]) -> list[str]:
    """Arms, those of the product first."""
    return sorted({run["arm"] for run in runs}, key=lambda name: (name.startswith("x-"), name != "ffn", name))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    digits = 1 if max(values) > 10 else 3
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
