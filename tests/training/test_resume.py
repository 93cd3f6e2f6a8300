"""A run that is killed, stopped or moved to other ranks is the run that was never interrupted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_entries
import torch
from processes import REPOSITORY, run_python, run_ranks, start_ranks
from safetensors.torch import load_file, save_file
from tiny_artifacts import save, trained_model
from tiny_entries import build_world

from dehvf_ds.config import UserError, parse_run_config
from dehvf_ds.data.examples import open_examples
from dehvf_ds.distributed import REQUEUE_EXIT_CODE
from dehvf_ds.training.checkpoint import STATE_FILE, Checkpoint
from dehvf_ds.training.run_dir import choose_start
from dehvf_ds.training.run_lock import RunLock

TRAIN = REPOSITORY / "dehvf_ds/train.py"
STEPS = 8
# None divides by a number of ranks.
ODD_SIZES = {"--model.rank": 7, "--model.router_dim": 5, "--model.feature_layers": "[1,3,4]"}
ODD_SIZES |= {"--model.lora.rank": 3, "--train.micro_batch_size": 1, "--train.router_every": 4}
ODD_SIZES |= {"--train.lr": 0.0005, "--train.warmup_steps": 2, "--data.max_tokens": 40}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("resume"))


def arguments(world: Path, run: str, *, stage: int = 3, **changes: object) -> list[str]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 300}
    (world / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    flags = {"--deepspeed": world / f"zero{stage}.json", "--run_dir": world / run, **ODD_SIZES}
    flags |= {"--train.steps": STEPS, "--train.save_every": 3, **changes}
    return tiny_entries.arguments(world, run, *(str(part) for item in flags.items() for part in item))


def lines(world: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]


def losses(world: Path, run: str) -> list[float]:
    return [line["train/loss"] for line in lines(world, run)]


def forget_after(world: Path, run: str, step: int) -> None:
    """Leaves the run as a kill after ``step`` did: without later checkpoints."""
    for path in (world / run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


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
    assert "continuing after step 6" in outputs[0]
    resumed = lines(world, run)
    for before, after in zip(whole, resumed, strict=True):
        for key in ("step", "samples", "tokens", "rows_crc", "train/loss", "train/grad_norm", "lr", "epoch"):
            assert after[key] == before[key], key
    assert (world / run / "adapter/visual.safetensors").read_bytes() == trained
    if stage == 3:
        # A third call finds nothing left to do.
        assert "finished already" in run_ranks(TRAIN, arguments(world, run, **more), 2)[0]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run of 18 steps without dropout, on 2 ranks, with a checkpoint of every second step."""
    run_ranks(TRAIN, long_arguments(world, "whole"), 2)
    return world / "whole"


def long_arguments(world: Path, run: str, *, stage: int = 3, **changes: object) -> list[str]:
    fixed = {"--train.steps": 18, "--train.save_every": 2, "--train.keep_checkpoints": 99}
    return arguments(world, run, stage=stage, **(fixed | changes))


def copy_until(world: Path, source: str, run: str, step: int) -> None:
    """Copies a run as a kill after ``step`` left it."""
    shutil.copytree(world / source, world / run)
    forget_after(world, run, step)


@pytest.mark.slow
def test_resume_on_other_ranks_and_stages(world: Path, whole: Path) -> None:
    state = load_file(whole / "checkpoints/step_00000018" / STATE_FILE)
    moves = (("whole", "one", 2, 1, 3), ("one", "two", 12, 2, 2), ("whole", "four", 2, 4, 2))
    for source, run, step, ranks, stage in moves:
        copy_until(world, source, run, step)
        run_ranks(TRAIN, long_arguments(world, run, stage=stage), ranks)
        assert losses(world, run) == pytest.approx(losses(world, "whole"), rel=1e-5)
        seen = [[(line["samples"], line["rows_crc"]) for line in lines(world, r)] for r in (run, "whole")]
        assert seen[0] == seen[1]
        moved = load_file(world / run / "checkpoints/step_00000018" / STATE_FILE)
        assert moved.keys() == state.keys()
        for name, value in state.items():
            assert (moved[name] - value).norm() <= 3e-2 * value.norm() + 1e-6, name


@pytest.mark.slow
def test_signals_save_and_ask_for_a_requeue(world: Path, whole: Path) -> None:
    args = long_arguments(world, "stopped", **{"--train.save_every": 0})
    done = 0
    # One rank hears it, all stop together: before there is anything to save, and between steps.
    for rank, number in ((1, signal.SIGUSR1), (1, signal.SIGTERM), (0, signal.SIGTERM)):
        begins = (rank, number) == (1, signal.SIGUSR1)
        processes = start_ranks(TRAIN, args, 2)
        wait_for(lambda: (world / "stopped/lock.json").exists())
        if not begins:
            wait_for_step(world / "stopped", done + 2)
        processes[rank].send_signal(number)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [REQUEUE_EXIT_CODE] * 2, outputs
        assert not (world / "stopped/lock.json").exists()
        assert "Traceback" not in "".join(outputs)
        if not begins:
            assert "stopped on request after step" in outputs[0]
            assert done < len(losses(world, "stopped")) < 18
            done = len(losses(world, "stopped"))
    run_ranks(TRAIN, args, 2)
    assert losses(world, "stopped") == losses(world, "whole")


@pytest.mark.slow
def test_a_run_directory_has_one_live_job_and_a_dead_rank_ends_the_others(world: Path) -> None:
    processes = start_ranks(TRAIN, arguments(world, "dead", **{"--train.steps": 200}), 2)
    wait_for_step(world / "dead", 2)
    with pytest.raises(UserError, match=f"{world / 'dead'} is in use by process {processes[0].pid} on "):
        RunLock(world / "dead")
    processes[1].kill()
    processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, REQUEUE_EXIT_CODE)
    processes[1].communicate()


@pytest.mark.slow
def test_a_job_whose_directory_was_taken_over_stops_and_writes_nothing_more(world: Path) -> None:
    args = arguments(world, "stale", **{"--train.steps": 2000, "--train.save_every": 0})
    processes = start_ranks(TRAIN, args, 2)
    wait_for_step(world / "stale", 3)
    taken = json.dumps({"host": "elsewhere", "pid": 7, "job": "42", "token": "another"})
    (world / "stale/lock.json").write_text(taken)
    before = (world / "stale/metrics.jsonl").read_text()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert processes[0].returncode == 2, outputs
    assert "was taken over by process 7 on elsewhere, job 42; this job stops" in outputs[0]
    assert processes[1].returncode != 0
    assert (world / "stale/lock.json").read_text() == taken
    assert not (world / "stale/checkpoints").exists()
    # A line may have been on its way.
    after = (world / "stale/metrics.jsonl").read_text()
    assert len(after.splitlines()) - len(before.splitlines()) <= 1


@pytest.mark.slow
def test_what_would_be_another_run_is_refused(world: Path, whole: Path, capsys) -> None:
    copy_until(world, "whole", "kept", 18)
    tensors = load_file(world / "llm/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
    shutil.copytree(world / "llm", world / "other_llm")
    save_file(tensors, world / "other_llm/model.safetensors", metadata={"format": "pt"})
    other_llm = {"--model.language_model": world / "other_llm"}
    other_weights = "differs from it in the weights of model.layers.1.mlp.up_proj.weight"
    for changes, message in (
        ({"--train.lr": 0.1}, "train.lr (0.0005 there, 0.1 now)"),
        ({"--data.train": world / "test"}, "was trained on other shards than data.train"),
        ({"--resume": world / "kept/checkpoints/step_99"}, "step_99: not a complete checkpoint"),
        (other_llm, other_weights),
        ({**other_llm, "--run_dir": world / "new", "--init_from": world / "kept"}, other_weights),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            start_of(long_arguments(world, "kept", **changes))
    damaged = world / "kept/checkpoints/step_00000018/state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = start_of(long_arguments(world, "kept"))
    assert found is not None
    assert found.progress.step == 16
    message = "changed since it was written (size or sha256 differs); looking for an older one"
    assert message in capsys.readouterr().err


def start_of(args: list[str]) -> Checkpoint | None:
    """What a run with these arguments would go on from."""
    config = parse_run_config(args)
    return choose_start(config, open_examples(config.data, seed=0).index.digest)


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_alive_until_too_many_checkpoints_failed(world: Path) -> None:
    # No file may grow beyond this: the state of a checkpoint does, nothing else of the run.
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

    def run(max_failed_saves: int):
        more = {"--train.max_failed_saves": max_failed_saves, "--overwrite": "true"}
        return run_python(["-c", limited, TRAIN, *arguments(world, "full", **more)])

    # The last save is one of them: it ends the run, as it would have ended anyway.
    result = run(3)
    assert (result.returncode, len(losses(world, "full"))) == (0, STEPS), result.stderr
    result = run(2)
    assert "checkpoint of step 3 not written: " in result.stderr
    assert "the run goes on" in result.stderr
    assert "error: 2 checkpoints in a row could not be written; stopped at step 6;" in result.stderr
    assert result.returncode == 74
    assert len(losses(world, "full")) == 6
    assert list((world / "full/checkpoints").glob("*")) == []


@pytest.mark.slow
def test_validation_is_the_same_on_any_ranks_and_keeps_the_best(world: Path) -> None:
    more = {"--data.val": world / "test", "--train.validate_every": 2, "--train.save_every": 2}
    run_ranks(TRAIN, arguments(world, "val1", **more), 1)
    run_ranks(TRAIN, arguments(world, "val2", **more), 2)
    one, two = ([line.get("val/loss") for line in lines(world, run)] for run in ("val1", "val2"))
    assert [value is not None for value in one] == [False, True] * 4
    assert [v for v in two if v] == pytest.approx([v for v in one if v], rel=1e-5)
    best = (world / "val1/checkpoints/best").read_text().strip()
    lowest = min(range(2, STEPS + 1, 2), key=lambda step: one[step - 1])
    assert best == f"step_{lowest:08d}"
    # The last validated line also carries what the fuser has learnt.
    assert lines(world, "val2")[-1].keys() >= {"router/mean/04", "router/entropy/00", "visual/scale/01"}
    assert lines(world, "val2")[-1]["visual/scale/01"] > 0


@pytest.mark.slow
def test_a_new_run_starts_from_another_runs_adapter(world: Path, whole: Path) -> None:
    more = {"--init_from": whole, "--train.lr": 1e-9, "--train.steps": 1}
    run_ranks(TRAIN, arguments(world, "second", **more), 2)
    first, second = (load_file(world / run / "adapter/visual.safetensors") for run in ("whole", "second"))
    for name, value in first.items():
        assert torch.allclose(second[name], value, atol=1e-6), name
    assert losses(world, "second")[0] < losses(world, "whole")[0]


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Waits until the run has written this step's line."""
    path = run_dir / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= step)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """What a run of the recipe could have trained."""
    bases = {"language_model": str(world / "llm"), "vision_tower": str(world / "tower")}
    settings = {"feature_layers": [1, 3, 4], "rank": 7, "router_dim": 5, "image_size": 16}
    lora = {"rank": 3, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]}
    save(trained_model(bases, **settings, lora=lora), bases, world / "trained")
    return world / "trained"


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("model.feature_layers", "[2,3,4]", "[1, 3, 4] there"),
        ("model.router", "static", "layer there, static now"),
        ("model.fusion", "prefix", "ffn there"),
        ("model.image_size", "24", "16 there"),
        ("model.lora.rank", "0", "3 there, 0 now"),
        ("model.lora.alpha", "4", "8.0 there, 4.0 now"),
        ("model.lora.targets", "up_proj", "['down_proj'] there, ['up_proj'] now"),
    ],
)
def test_a_run_starts_from_weights_of_the_same_model_alone(world, trained, key, value, there) -> None:
    flags = {"--init_from": trained, "--train.lr": 1e-9, "--model.lora.dropout": 0.5}
    assert choose_start(parse_run_config(arguments(world, "new", **flags)), "") is None
    config = parse_run_config(arguments(world, "new", **flags, **{f"--{key}": value}))
    with pytest.raises(UserError, match=re.escape(f"{key} ({there}")):
        choose_start(config, "")
