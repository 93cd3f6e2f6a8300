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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import deepspeed
import psutil
import torch

import dehvf_ds.eval
import dehvf_ds.train
from dehvf_ds.config import UserError
from dehvf_ds.data import loader
from dehvf_ds.distributed import connect_ranks, gather_to_main, on_main, read_world, run_entry
from dehvf_ds.evaluation import predict
from dehvf_ds.model import ModelError
from dehvf_ds.training import checkpoint, engine, trainer

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
    step = trainer.train_step

    def then(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == number:
            note()
            act()
        return step(*args, **kwargs)

    trainer.train_step = then


def kill_workers() -> None:
    for child in psutil.Process().children():
        child.kill()


def unreadable_sample() -> None:
    error = UserError("train/000001.tar: sample 7: cut short")

    def read(*_: Any) -> UserError:
        note()
        return error

    loader.BatchReader.__getitem__ = read


def send(*numbers: signal.Signals) -> Callable[[], None]:
    """Sends signals to the process that calls it, as clusters do: twice, perhaps."""

    def act() -> None:
        note()
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def while_it_answers(act: Callable[[], Any]) -> None:
    """Has something happen when the first answers are to be written down."""
    add = predict.PredictionCache.add

    def then(*args: Any, **kwargs: Any) -> Any:
        act()
        return add(*args, **kwargs)

    predict.PredictionCache.add = then


def travel(_: list[str]) -> int:
    """Gives more than torch's store takes at a time from rank 0 to the other, and back."""
    place = read_world()
    connect_ranks(place)
    given = on_main(place, lambda: bytes(LARGE_BYTES))
    found = gather_to_main([len(given)], place)
    assert place.rank or found == [LARGE_BYTES] * 2
    return 0


LARGE_BYTES = 20_000_000
train, evaluation, travels = dehvf_ds.train, dehvf_ds.eval, SimpleNamespace(main=travel)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        inject: called in the faulty rank before it begins.
        program: what both ranks run.
        rank: the faulty one.
        rank_1_waits_s: how much later than rank 0 the other begins.
        stderr: of the faulty rank, where it does not go with the rest.
    """

    inject: Callable[[], Any]
    program: Any = train
    rank: int = 1
    rank_1_waits_s: float = 0.0
    stderr: str | None = None


def bug() -> None:
    at_step(2, failing(KeyError("no such thing")))


def wrong_configuration() -> None:
    train.parse_run_config = failing(UserError("--config run.yaml: no such file"))


FAULTS = {
    "none": Fault(lambda: None),
    "configuration": Fault(wrong_configuration),
    "configuration before the other begins": Fault(wrong_configuration, rank=0, rank_1_waits_s=8),
    "mount": Fault(
        lambda: setattr(train, "resolve", failing(UserError("data.train /mnt/x: no such directory")))
    ),
    "loading": Fault(
        lambda: setattr(engine, "load_model", failing(ModelError("model.safetensors: cut short")))
    ),
    "sample": Fault(unreadable_sample),
    "worker": Fault(lambda: at_step(2, kill_workers)),
    "memory": Fault(
        lambda: at_step(2, failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")))
    ),
    "bug": Fault(bug),
    "bug of rank 0": Fault(bug, rank=0),
    "bug where the log's disk is full": Fault(bug, stderr="/dev/full"),
    "killed": Fault(lambda: at_step(2, send(signal.SIGKILL))),
    "rank 0 killed": Fault(lambda: at_step(2, send(signal.SIGKILL)), rank=0),
    "validation": Fault(
        lambda: setattr(
            trainer, "validation_loss", failing(OSError(errno.EIO, "Input/output error", "val/0.tar"))
        )
    ),
    "saving": Fault(
        lambda: setattr(
            checkpoint, "gather_state", failing(OSError(errno.ENOSPC, "No space left on device", "state"))
        )
    ),
    "answers": Fault(
        lambda: setattr(
            predict.PredictionCache, "add", failing(UserError("rank-00001.jsonl: No space left on device"))
        ),
        evaluation,
    ),
    "stopped while it answers": Fault(lambda: while_it_answers(send(signal.SIGTERM)), evaluation),
    "stopped twice": Fault(
        lambda: while_it_answers(send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)), evaluation
    ),
    "large values": Fault(lambda: None, travels),
}


def arguments(world: Path, program: Any, name: str) -> list[str]:
    if program is travels:
        return []
    output = str(world / "runs" / name.replace(" ", "-"))
    if program is evaluation:
        data = ["--data", str(world / "test"), "--tokenizer", "simple", "--batch_size", "1"]
        return ["--model", str(world / "runs/none"), *data, "--output", output]
    run = ["--config", str(world / "recipe.yaml"), "--deepspeed", str(world / "ds.json")]
    more = ["--data.val", str(world / "test"), "--train.validate_every", "2", "--data.on_bad", "raise"]
    return [*run, "--run_dir", output, *more]


def start(fault: Fault, args: list[str], rank: int, port: int, out: Path) -> int:
    """Forks a rank; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank == 1:
        time.sleep(fault.rank_1_waits_s)
    if rank == fault.rank:
        if fault.stderr is not None:
            os.dup2(os.open(fault.stderr, os.O_WRONLY), 2)
        fault.inject()
    sys.argv = ["program", *args]
    code: object = 99
    try:
        run_entry(fault.program.main, distributed=True)
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code if isinstance(code, int) else 1)


def wait_for(pids: list[int]) -> list[int | None]:
    """The exit codes of processes; None for those that had to be killed in the end."""
    codes: list[int | None] = [None] * len(pids)
    began = time.monotonic()
    while None in codes and time.monotonic() - began < LIMIT_S:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return codes


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(world: Path, name: str) -> dict[str, Any]:
    """Runs two ranks, one of them faulty."""
    global scratch
    fault, port = FAULTS[name], free_port()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        began = time.monotonic()
        outs = [scratch / str(rank) for rank in (0, 1)]
        args = arguments(world, fault.program, name)
        codes = wait_for([start(fault, args, rank, port, outs[rank]) for rank in (0, 1)])
        ended = time.monotonic()
        happened = scratch / "fault"
        if happened.exists():
            began = float(happened.read_text())
        texts = [out.read_text(errors="replace") for out in outs]
    return {"codes": codes, "seconds": ended - began, "outputs": texts}


def run_two_jobs(world: Path) -> dict[str, Any]:
    """Starts a second job where a first one meets; its ranks are the second and the fourth of the lists."""
    fault, port = FAULTS["none"], free_port()
    with tempfile.TemporaryDirectory() as directory:
        outs = [Path(directory) / str(number) for number in range(4)]
        first, second = (arguments(world, train, name) for name in ("first", "second"))
        began = time.monotonic()
        pids = [start(fault, first, 0, port, outs[0])]
        # The second one's ranks find a store at the port, before and after it is complete.
        wait_until_listening(port)
        pids.append(start(fault, second, 0, port, outs[1]))
        pids.append(start(fault, first, 1, port, outs[2]))
        time.sleep(3)
        pids.append(start(fault, second, 1, port, outs[3]))
        codes = wait_for(pids)
        texts = [out.read_text(errors="replace") for out in outs]
    return {"codes": codes, "seconds": time.monotonic() - began, "outputs": texts}


def wait_until_listening(port: int) -> None:
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)


def main() -> None:
    """Goes through the faults; the first is none, and its run is evaluated later."""
    world = Path(sys.argv[1])
    found = {name: run(world, name) for name in FAULTS}
    found["two jobs"] = run_two_jobs(world)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
