"""Seconds from the start of a process to the first line of train.py, beside what its libraries take alone.

    python benchmarks/first_line.py

The line comes when everything that can be wrong has been checked, before weights are loaded. In turn with it
a process imports of torch, transformers and DeepSpeed what any trainer of such models imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile

from bench import REPOSITORY, flags, median_and_range, seconds_in_turn

LIBRARIES = "import torch, deepspeed; from transformers import AutoModelForImageTextToText, PreTrainedModel"


def main() -> None:
    """Parses the flags, starts the processes in turn, prints."""
    parser = flags(__doc__)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        program = ["dehvf_ds/train.py", "--deepspeed", "ds_configs/zero3.json", "--config", args.config]
        program += ["--run_dir", directory, "--overwrite", "true"]
        runs = {
            "train.py": lambda: wait_for_line(program),
            "libraries": lambda: wait_for_line(["-c", f"{LIBRARIES}; print()"]),
        }
        rounds = list(seconds_in_turn(runs, args.pairs))
    for name in runs:
        print(f"{name}: {median_and_range([seconds[name] for seconds in rounds])} s")
    ratio = statistics.median(seconds["train.py"] / seconds["libraries"] for seconds in rounds)
    print(f"train.py / libraries: median {ratio:.2f}")


def wait_for_line(arguments: list[str]) -> None:
    """Runs Python until it says something, and kills it then."""
    command = [sys.executable, "-u", *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        # DeepSpeed's log goes there, too.
        assert next((line for line in process.stdout if not line.startswith(b"[")), None), command
        process.kill()


if __name__ == "__main__":
    main()
