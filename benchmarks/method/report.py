"""Tables of what `sweep.py` has run so far.

python benchmarks/method/report.py [--steps 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from arms import read_arm
from scenes import GRANULARITIES
from sweep import RESULTS


def main() -> None:
    """Prints the learning rates tried and the arms' means over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))]
    runs = [run for run in runs if run["steps"] == args.steps]
    names = sorted({run["arm"] for run in runs})
    rates = sorted({run["lr"] for run in runs})
    print("Loss a token on the validation scenes, seed 0\n")
    print("| arm | " + " | ".join(f"{lr:g}" for lr in rates) + " |\n|---|" + "---|" * len(rates))
    for name in names:
        tried = {r["lr"]: r["loss"] for r in runs if r["arm"] == name and r["split"] == "val"}
        print(f"| {name} | " + " | ".join(f"{tried[lr]:.3f}" if lr in tried else "" for lr in rates) + " |")
    columns = ("loss", "CIDEr", *GRANULARITIES)
    print("\nOn the test scenes: mean and standard deviation over seeds\n")
    print("| arm | seeds | lr | trained | CPU s a step | " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|" + "---|" * len(columns))
    for name in names:
        found = [run for run in runs if run["arm"] == name and run["split"] == "test"]
        if found:
            head = [name, len(found), f"{found[0]['lr']:g}", f"{found[0]['trained'] / 1e6:.2f} M"]
            head.append(f"{statistics.median(run['step_cpu_s'] for run in found):.2f}")
            cells = [*map(str, head), *(spread([run[column] for run in found]) for column in columns)]
            print("| " + " | ".join(cells) + " |")
    print()
    for name in names:
        print(f"- `{name}`: {read_arm(name).about}")


def spread(values: list[Any]) -> str:
    """Mean and standard deviation."""
    digits = 1 if max(values) > 10 else 3
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
