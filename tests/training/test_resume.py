"""A run that is killed, stopped or moved to other ranks is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.launch import REPOSITORY, run_ranks, start_ranks
from training.resume_world import build_world, recipe

from dehvf_ds.training.resume import read_checkpoint
from dehvf_ds.training.signals import REQUEUE_EXIT_CODE

TRAIN = REPOSITORY / "dehvf_ds/train.py"
STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("resume"))


def arguments(world: Path, run: str, *, stage: int = 3, **changes: object) -> list[str]:
    (world / f"zero{stage}.json").write_text(
        json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 300}})
    )
    flags = {"--train.steps": STEPS, "--train.save_every": 3, **changes}
    fixed = ["--config", recipe(world), "--deepspeed", str(world / f"zero{stage}.json")]
    return [*fixed, "--run_dir", str(world / run), *(str(part) for item in flags.items() for part in item)]


def lines(world: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]


def losses(world: Path, run: str) -> list[float]:
    return [line["train/loss"] for line in lines(world, run)]


def forget_after(world: Path, run: str, step: int) -> None:
    """Leaves the run as a kill after ``step`` did: later checkpoints and the artifact are not there."""
    root = world / run / "checkpoints"
    for path in root.glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_resume_in_a_fresh_process_is_bit_equal(world: Path, stage: int) -> None:
    run = f"equal{stage}"
    # Dropout included: its masks are functions of where the run stands.
    more = {"stage": stage, "--model.lora.dropout": 0.2}
    run_ranks(TRAIN, arguments(world, run, **more), 2)
    whole = lines(world, run)
    trained = (world / run / "adapter/visual.safetensors").read_bytes()
    assert [path.name for path in sorted((world / run / "checkpoints").glob("step_*"))] == [
        "step_00000006",
        "step_00000008",
    ]
    forget_after(world, run, 6)
    outputs = run_ranks(TRAIN, arguments(world, run, **more), 2)
    assert "going on after step 6" in outputs[0]
    resumed = lines(world, run)
    for before, after in zip(whole, resumed, strict=True):
        for key in ("step", "samples", "tokens", "train/loss", "train/grad_norm", "lr", "epoch"):
            assert after[key] == before[key], key
    assert (world / run / "adapter/visual.safetensors").read_bytes() == trained
    # A third call finds nothing left to do.
    outputs = run_ranks(TRAIN, arguments(world, run, **more), 2)
    assert "finished already" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "stages"), [(2, 1, (3, 3)), (1, 2, (3, 2)), (2, 4, (2, 3))])
def test_resume_on_other_ranks_and_stages(world: Path, before: int, after: int, stages: tuple) -> None:
    run = f"moved-{before}-{after}"
    run_ranks(TRAIN, arguments(world, run, stage=stages[0]), before)
    whole = losses(world, run)
    state = read_checkpoint(world / run / "checkpoints/step_00000008").load_tensors()
    forget_after(world, run, 6)
    run_ranks(TRAIN, arguments(world, run, stage=stages[1]), after)
    assert losses(world, run) == pytest.approx(whole, rel=1e-5)
    moved = read_checkpoint(world / run / "checkpoints/step_00000008").load_tensors()
    assert moved.keys() == state.keys()
    for name, value in state.items():
        assert (moved[name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name


@pytest.mark.slow
def test_signals_save_and_ask_for_a_requeue(world: Path) -> None:
    run_ranks(TRAIN, arguments(world, "calm", **{"--train.save_every": 0}), 2)
    args = arguments(world, "stopped", **{"--train.save_every": 0})
    processes = start_ranks(TRAIN, args, 2)
    wait_for_step(world / "stopped", 2)
    # One rank hears it, all stop together.
    processes[1].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [REQUEUE_EXIT_CODE] * 2, outputs
    assert "stopped on request after step" in outputs[0]
    assert not (world / "stopped/lease.json").exists()
    assert 2 <= len(losses(world, "stopped")) < STEPS
    run_ranks(TRAIN, args, 2)
    assert losses(world, "stopped") == losses(world, "calm")


@pytest.mark.slow
def test_a_dead_rank_ends_the_others(world: Path) -> None:
    processes = start_ranks(TRAIN, arguments(world, "dead", **{"--train.steps": 200}), 2)
    wait_for_step(world / "dead", 2)
    processes[1].kill()
    started = time.monotonic()
    processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, REQUEUE_EXIT_CODE)
    assert time.monotonic() - started < 60
    processes[1].communicate()


@pytest.mark.slow
def test_a_run_directory_has_one_live_job(world: Path) -> None:
    args = arguments(world, "leased", **{"--train.steps": 200})
    (first,) = start_ranks(TRAIN, args, 1)
    wait_for_step(world / "leased", 1)
    (second,) = start_ranks(TRAIN, args, 1)
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 2
    assert f"run_dir {world / 'leased'} is in use by process {first.pid}" in output
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_what_would_be_another_run_is_refused(world: Path) -> None:
    run_ranks(TRAIN, arguments(world, "kept"), 1)
    for changes, message in (
        ({"--train.lr": 0.1}, "train.lr (0.002 there, 0.1 now)"),
        ({"--data.train": world / "other"}, "was trained on other shards than data.train"),
        ({"--resume": world / "kept/checkpoints/step_99"}, "step_99: not a whole checkpoint"),
    ):
        (process,) = start_ranks(TRAIN, arguments(world, "kept", **changes), 1)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 2, output
        assert message in output
        assert "Traceback" not in output
    damaged = world / "kept/checkpoints/step_00000008/state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    outputs = run_ranks(TRAIN, arguments(world, "kept"), 1)
    assert "changed since it was written (size or sha256 differs); looking for an older one" in outputs[0]
    assert "going on after step 6" in outputs[0]


@pytest.mark.slow
def test_other_frozen_weights_are_refused_by_name(world: Path) -> None:
    run_ranks(TRAIN, arguments(world, "based"), 1)
    tensors = load_file(world / "llm/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.1
    shutil.copytree(world / "llm", world / "other_llm")
    save_file(tensors, world / "other_llm/model.safetensors", metadata={"format": "pt"})
    for changes in ({}, {"--run_dir": world / "another", "--init_from": world / "based"}):
        more = {"--model.language_model": world / "other_llm", **changes}
        (process,) = start_ranks(TRAIN, arguments(world, "based", **more), 1)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 2, output
        assert "differs from it in the weights of model.layers.2.mlp.up_proj.weight" in output


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_alive(world: Path) -> None:
    # No file may grow beyond this: the state of one does, nothing else of the run.
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", limited, str(TRAIN), *arguments(world, "full")],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "checkpoint of step 3 not written: " in result.stderr
    assert "the run goes on" in result.stderr
    assert len(losses(world, "full")) == STEPS
    assert list((world / "full/checkpoints").glob("*")) == []


@pytest.mark.slow
def test_validation_is_the_same_on_any_ranks_and_keeps_the_best(world: Path) -> None:
    more = {"--data.val": world / "other", "--train.eval_every": 2, "--train.save_every": 2}
    run_ranks(TRAIN, arguments(world, "val1", **more), 1)
    run_ranks(TRAIN, arguments(world, "val2", **more), 2)
    one, two = ([line.get("val/loss") for line in lines(world, run)] for run in ("val1", "val2"))
    assert [value is not None for value in one] == [False, True] * 4
    assert [v for v in two if v] == pytest.approx([v for v in one if v], rel=1e-5)
    best = (world / "val1/checkpoints/best").read_text().strip()
    lowest = min(range(2, STEPS + 1, 2), key=lambda step: one[step - 1])
    assert best == f"step_{lowest:08d}"
    # The last validated line also carries what the fuser has learnt.
    assert lines(world, "val2")[-1].keys() >= {"levels/mean/04", "levels/entropy/00", "visual/gain/01"}
    assert lines(world, "val2")[-1]["visual/gain/01"] > 0


@pytest.mark.slow
def test_a_new_run_starts_from_another_runs_adapter(world: Path) -> None:
    run_ranks(TRAIN, arguments(world, "first"), 1)
    more = {"--init_from": world / "first", "--train.lr": 1e-9, "--train.steps": 1}
    run_ranks(TRAIN, arguments(world, "second", **more), 2)
    first, second = (load_file(world / run / "adapter/visual.safetensors") for run in ("first", "second"))
    for name, value in first.items():
        assert torch.allclose(second[name], value, atol=1e-6), name
    assert losses(world, "second")[0] < losses(world, "first")[0]


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 120) -> None:
    """Waits until the run has written this step's line."""
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)
