"""Starts two ranks of a program for each fault, which happens on one of them; both are forks of this process.

    python rank_faults.py WORLD RESULTS

writes a JSON object: for each fault what the two printed, how they ended, and how long after the fault.
Forked, they need not import torch again; nothing of torch is used before.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import psutil
import torch

import dehvf_ds.eval
import dehvf_ds.train
from dehvf_ds.config import UserError
from dehvf_ds.data import samples
from dehvf_ds.distributed import run_entry
from dehvf_ds.evals import parts
from dehvf_ds.model import ModelError
from dehvf_ds.training import checkpoint, engine, loop

assert deepspeed
LIMIT_S = 180
"""For a start, a fault and an end, on a machine that does other things too."""

scratch = Path()


def note() -> None:
    """Notes when the fault happens, the first time."""
    with suppress(FileExistsError), (scratch / "fault").open("x") as file:
        file.write(str(time.monotonic()))


def failing(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        note()
        raise error

    return fail


def at_step(number: int, act: Callable[[], Any]) -> None:
    """Has something happen before an optimizer step."""
    step = loop.train_step

    def then(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == number:
            note()
            act()
        return step(*args, **kwargs)

    loop.train_step = then


def kill_workers() -> None:
    for child in psutil.Process().children():
        child.kill()


def unreadable_sample() -> None:
    error = UserError("train/000001.tar: sample 7: cut short")

    def read(*_: Any) -> UserError:
        note()
        return error

    samples.SampleReader.__getitem__ = read


FAULTS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "configuration": (
        dehvf_ds.train,
        lambda: setattr(
            dehvf_ds.train, "parse_run_config", failing(UserError("--config run.yaml: no such file"))
        ),
    ),
    "mount": (
        dehvf_ds.train,
        lambda: setattr(dehvf_ds.train, "check", failing(UserError("data.train /mnt/x: no such directory"))),
    ),
    "loading": (
        dehvf_ds.train,
        lambda: setattr(engine, "load_model", failing(ModelError("model.safetensors: cut short"))),
    ),
    "sample": (dehvf_ds.train, unreadable_sample),
    "worker": (dehvf_ds.train, lambda: at_step(2, kill_workers)),
    "memory": (
        dehvf_ds.train,
        lambda: at_step(2, failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))),
    ),
    "bug": (dehvf_ds.train, lambda: at_step(2, failing(KeyError("no such thing")))),
    "killed": (dehvf_ds.train, lambda: at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "validation": (
        dehvf_ds.train,
        lambda: setattr(
            dehvf_ds.train, "validation_loss", failing(OSError(errno.EIO, "Input/output error", "val/0.tar"))
        ),
    ),
    "saving": (
        dehvf_ds.train,
        lambda: setattr(
            checkpoint, "gather_state", failing(OSError(errno.ENOSPC, "No space left on device", "state"))
        ),
    ),
    "answers": (
        dehvf_ds.eval,
        lambda: setattr(
            parts.AnswerParts, "add", failing(UserError("rank-00001.jsonl: No space left on device"))
        ),
    ),
}


def arguments(world: Path, program: Any, name: str) -> list[str]:
    if program is dehvf_ds.eval:
        data = ["--data", str(world / "test"), "--tokenizer", "simple", "--batch_size", "1"]
        return ["--model", str(world / "runs/whole"), *data, "--output", str(world / "runs" / name)]
    run = ["--config", str(world / "recipe.yaml"), "--deepspeed", str(world / "ds.json")]
    more = ["--data.val", str(world / "test"), "--train.eval_every", "2", "--data.on_bad", "raise"]
    return [*run, "--run_dir", str(world / "runs" / name), *more]


def start(
    program: Any, args: list[str], rank: int, port: int, fault: Callable[[], Any] | None, out: Path
) -> int:
    """Forks a rank; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fault is not None:
        fault()
    sys.argv = ["program", *args]
    try:
        run_entry(program.main, meets=True)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    os._exit(99)


def run(world: Path, name: str, faulty: int | None) -> dict[str, Any]:
    """Runs two ranks, one of them faulty."""
    program, fault = FAULTS.get(name, (dehvf_ds.train, None))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    global scratch
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        began = time.monotonic()
        outs = [scratch / str(rank) for rank in (0, 1)]
        args = arguments(world, program, name if faulty is None else f"{name}-{faulty}")
        pids = {
            start(program, args, rank, port, fault if rank == faulty else None, outs[rank]): rank
            for rank in (0, 1)
        }
        codes: list[int | None] = [None, None]
        while None in codes and time.monotonic() - began < LIMIT_S:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                codes[pids[pid]] = os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        for pid, rank in pids.items():
            if codes[rank] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        ended = time.monotonic()
        happened = scratch / "fault"
        if happened.exists():
            began = float(happened.read_text())
        texts = [out.read_text(errors="replace") for out in outs]
    return {"codes": codes, "seconds": ended - began, "outputs": texts}


def main() -> None:
    """Runs a whole training first, which is evaluated later."""
    world = Path(sys.argv[1])
    found = {"whole": run(world, "whole", None)}
    for name in FAULTS:
        found[name] = run(world, name, 1)
    found["bug of rank 0"] = run(world, "bug", 0)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
