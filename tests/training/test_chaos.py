"""A run that is killed again and again, checkpoint writing included, is the run that was never killed.

Three kills in the suite; ``make chaos`` sets CHAOS_KILLS to 20.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from processes import REPOSITORY, run_ranks, start_ranks
from tiny_entries import arguments, build_world

from dehvf_ds.training.checkpoint import find_checkpoint

TRAIN = REPOSITORY / "dehvf_ds/train.py"
KILLS = int(os.environ.get("CHAOS_KILLS", "3"))
STEPS = 12 + 6 * KILLS
COMPARED = ("step", "samples", "tokens", "rows_crc", "train/loss", "train/grad_norm", "lr")


@pytest.mark.long
@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    fixed = ["--train.steps", str(STEPS), "--train.save_every", "2", "--model.lora.dropout", "0.1"]
    run_ranks(TRAIN, arguments(world, "calm", *fixed), 2)

    chaotic, run_dir = arguments(world, "chaos", *fixed), world / "runs/chaos"
    draw = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    for kill in range(KILLS):
        processes = start_ranks(TRAIN, chaotic, 2)
        # Every other one while a checkpoint is being written, the rest whenever.
        moment = wait_for_a_part if kill % 2 == 0 else wait_a_while
        print(f"kill {kill + 1}: {moment(run_dir, draw)}", flush=True)
        for process in draw.sample(processes, 2):
            process.kill()
        for process in processes:
            process.communicate(timeout=60)
        found = find_checkpoint(run_dir, "auto")
        print(f"  left: {found.path.name if found else 'no checkpoint'}", flush=True)
    run_ranks(TRAIN, chaotic, 2)

    calm, chaos = (read(world / "runs" / run / "metrics.jsonl") for run in ("calm", "chaos"))
    assert chaos == calm
    assert len(calm) == STEPS
    calm, chaos = (world / "runs" / run / "adapter/visual.safetensors" for run in ("calm", "chaos"))
    assert chaos.read_bytes() == calm.read_bytes()
    assert list((run_dir / "checkpoints").glob(".*")) == []


def wait_for_a_part(run_dir: Path, draw: random.Random) -> str:
    """Until a checkpoint is half written, the drawn one from now on."""
    for _ in range(draw.randint(1, 3)):
        while not (parts := list(run_dir.glob("checkpoints/.step_*.part"))):
            time.sleep(0.0005)
        name = parts[0].name
        if draw.random() < 0.5:
            break
        while (run_dir / "checkpoints" / name).exists():
            time.sleep(0.0005)
    return f"while {name} was written"


def wait_a_while(run_dir: Path, draw: random.Random) -> str:
    """Until some steps after the newest checkpoint, and a moment more."""
    path = run_dir / "metrics.jsonl"
    found = find_checkpoint(run_dir, "auto")
    step = (found.progress.step if found else 0) + draw.randint(1, 8)
    # Lines of steps after the checkpoint are removed in the start.
    before = path.stat().st_mtime if path.exists() else 0
    while not path.exists() or path.stat().st_mtime == before or path.read_text().count("\n") < step:
        time.sleep(0.005)
    seconds = draw.uniform(0, 0.2)
    time.sleep(seconds)
    return f"{seconds:.2f} s after step {step}"


def read(path: Path) -> list[dict]:
    return [{k: json.loads(line)[k] for k in COMPARED} for line in path.read_text().splitlines()]
