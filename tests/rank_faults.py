"""One rank of a program in which something goes wrong on the faulty rank.

python rank_faults.py FAULT RANK PROGRAM ARGUMENTS ...
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import torch

import dehvf_ds.eval
import dehvf_ds.train
from dehvf_ds.config import UserError
from dehvf_ds.data import loader
from dehvf_ds.distributed import connect_ranks, gather_to_main, on_main, read_world, run_entry
from dehvf_ds.evaluation import predict
from dehvf_ds.training import checkpoint, trainer

LARGE_BYTES = 20_000_000


def failing(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


def before(owner: Any, name: str, act: Callable[[], Any], *, step: int | None = None) -> None:
    """Has something happen before a function runs, or before it runs for a step."""
    function = getattr(owner, name)

    def then(*args: Any, **kwargs: Any) -> Any:
        if step is None or kwargs["step"] == step:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, then)


def at_step_2(act: Callable[[], Any]) -> None:
    before(trainer, "train_step", act, step=2)


def kill_workers() -> None:
    for child in psutil.Process().children():
        child.kill()


def unreadable_sample() -> None:
    error = UserError("train/000001.tar: sample 7: cut short")
    loader.BatchReader.__getitem__ = lambda *_: error


def send(*numbers: signal.Signals) -> Callable[[], None]:
    """Sends signals to this process, twice perhaps, as clusters do."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers].clear()


def bug() -> None:
    at_step_2(failing(KeyError("no such thing")))


def bug_on_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    bug()


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "mount": lambda: setattr(
        dehvf_ds.train, "resolve", failing(UserError("data.train /mnt/x: no such directory"))
    ),
    "answers": lambda: setattr(
        predict.PredictionCache, "add", failing(UserError("rank-00001.jsonl: No space left on device"))
    ),
    "sample": unreadable_sample,
    "worker": lambda: at_step_2(kill_workers),
    "memory": lambda: at_step_2(failing(torch.OutOfMemoryError("CUDA out of memory."))),
    "bug": bug,
    "bug where the log's disk is full": bug_on_full_disk,
    "killed": lambda: at_step_2(send(signal.SIGKILL)),
    "saving": lambda: setattr(
        checkpoint, "gather_state", failing(OSError(errno.ENOSPC, "No space left on device", "state"))
    ),
    "stopped": lambda: before(
        predict.PredictionCache, "add", send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    ),
}


def travel(_: list[str]) -> int:
    """Sends more than torch's store takes at a time from rank 0 to the other, and back."""
    world = read_world()
    connect_ranks(world)
    received = on_main(world, lambda: bytes(LARGE_BYTES))
    found = gather_to_main([len(received)], world)
    assert world.rank or found == [LARGE_BYTES] * 2
    return 0


PROGRAMS = {"train": dehvf_ds.train, "eval": dehvf_ds.eval, "travel": SimpleNamespace(main=travel)}

if __name__ == "__main__":
    fault, faulty, program, *sys.argv[1:] = sys.argv[1:]
    if os.environ["RANK"] == faulty:
        FAULTS[fault]()
    run_entry(PROGRAMS[program].main, distributed=True)
