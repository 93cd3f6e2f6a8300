"""Runs what is missing of the comparison, two arms side by side on a thread each; stop and start it at will.

    python benchmarks/method/sweep.py [--task scenes] [--arms ffn prefix64 ...] [--steps 200] [--minutes 60]
    python benchmarks/method/sweep.py --device cuda --at-once 14 --rows 64 --steps 400 ...

For each arm: a learning rate, chosen by the loss of seed 0 on the validation split from the same grid, which
goes on by factors of two where the best lies at its edge; with it seeds 1 to 3, measured on the test split.
One JSON a run lies in --output; `report.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from arms import ARMS
from tasks import TASKS

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
RESULTS = Path("runs/method")


class Job(NamedTuple):
    """One run."""

    task: str
    arm: str
    lr: float
    seed: int
    split: str
    steps: int
    rows: int
    device: str

    def path(self, results: Path) -> Path:
        """Where its result is, once it has ended."""
        run = f"{self.steps}x{self.rows}-{self.device}-lr{self.lr:g}-seed{self.seed}-{self.split}"
        return results / f"{self.task}-{self.arm}-{run}.json"


def main() -> None:
    """Parses the flags and runs jobs until none is left or the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=sorted(path.stem for path in ARMS.glob("*.yaml")))
    parser.add_argument("--task", choices=TASKS, default="scenes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--at-once", type=int, default=2, help="so many runs side by side")
    parser.add_argument("--unscored", action="store_true", help="as one_run.py has it")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="none: learning rates only")
    parser.add_argument("--minutes", type=float, default=1e6, help="no run is started after them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    until, running, failed = time.monotonic() + 60 * args.minutes, {}, set()
    while True:
        waiting = [job for job in jobs(args) if job not in failed | running.keys()]
        while waiting and len(running) < args.at_once and time.monotonic() < until:
            job = waiting.pop(0)
            running[job] = start(job, args.output, args.unscored)
        if not running:
            break
        time.sleep(1)
        for job in [job for job, process in running.items() if process.poll() is not None]:
            code = running.pop(job).returncode
            print(
                f"{job.path(args.output).stem}: {'done' if not code else f'failed ({code})'}",
                flush=True,
            )
            failed |= {job} if code else set()
    sys.exit(bool(failed))


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What is missing and can be run now."""
    for arm in args.arms:
        rates = sorted(args.rates)
        setting = (args.steps, args.rows, args.device)
        tries = [Job(args.task, arm, lr, 0, "val", *setting) for lr in rates]
        missing = [job for job in tries if not job.path(args.output).is_file()]
        if missing:
            yield from missing
            continue
        best = min(tries, key=lambda job: loss(job.path(args.output)))
        while len(rates) > 1 and best.lr in (rates[0], rates[-1]):
            rate = rates[0] / 2 if best.lr == rates[0] else rates[-1] * 2
            rates = sorted((*rates, rate))
            further = best._replace(lr=rate)
            if not further.path(args.output).is_file():
                yield further
                break
            best = min(best, further, key=lambda job: loss(job.path(args.output)))
        else:
            chosen = (best._replace(seed=seed, split="test") for seed in args.seeds)
            yield from (job for job in chosen if not job.path(args.output).is_file())


def loss(path: Path) -> float:
    """What a run ended with."""
    return json.loads(path.read_text())["loss"]


def start(job: Job, results: Path, unscored: bool) -> subprocess.Popen[bytes]:
    """A run in a process of its own, on one thread."""
    results.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("one_run.py")), "--output"]
    command.append(str(job.path(results)))
    for name, value in job._asdict().items():
        command += [f"--{name}", str(value)]
    command += ["--unscored"] * unscored
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": job.device}
    with job.path(results).with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


if __name__ == "__main__":
    main()
