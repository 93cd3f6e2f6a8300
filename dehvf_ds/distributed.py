"""This process's rank and device, collectives between ranks, and how a program of ours starts and ends."""

from __future__ import annotations

import errno
import faulthandler
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from transformers.utils import logging as transformers_logging

from dehvf_ds.config import JobError, UserError
from dehvf_ds.rank_store import Failure, RankStore, one_line, print_failure

USER_ERROR_EXIT_CODE = 2
REQUEUE_EXIT_CODE = 85
"""Exit code of a program that stopped on request: please start it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Loader workers ignore them (``data.loader``); the supervisor of a SLURM job handles them, too."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
"""Failures of the machine, to which a traceback would add nothing."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's place in the job: its number among all processes and among those of its node."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0


def read_world() -> World:
    """Reads this process's place from the environment that a launcher set; initialises no device.

    ``deepspeed`` and ``torchrun`` set RANK and friends. ``srun`` sets SLURM_*, which is copied to them,
    because DeepSpeed reads them there. Neither means one process.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env["LOCAL_WORLD_SIZE"] = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        # Rank 0 runs on the first node: gpu003 of SLURM's short form gpu[003-004,7],cpu1.
        nodes = re.sub(r"\[(\w+)[^\]]*\]", r"\1", env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        env.setdefault("MASTER_ADDR", nodes.partition(",")[0])
        # Below the ports that systems assign themselves (32768 on Linux). Jobs on one node do not collide,
        # and a job that is started again takes another port.
        job, restart = (int(env.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "RESTART_COUNT"))
        env.setdefault("MASTER_PORT", str(10000 + (job + 7919 * restart) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local_rank, local_size = (int(env[name]) for name in names)
    except ValueError as error:
        raise UserError(f"{', '.join(names)}: one is not a number: {error}") from None
    # Nodes may run different numbers of ranks, and SLURM reports the first node's.
    if not (0 <= rank < size and local_rank >= 0 and local_size >= 1):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}: no "
            "such place; start by deepspeed, torchrun or srun, or unset all four"
        )
    if not _uses_cuda():
        return World(rank, local_rank, size, local_size, torch.device("cpu"))
    # Each of several tasks on a node may see only its own GPU (srun --gpus-per-task, --gpu-bind).
    index = 0 if torch.cuda.device_count() == 1 else local_rank
    return World(rank, local_rank, size, local_size, torch.device("cuda", index))


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def has_fast_bf16() -> bool:
    """Whether this device multiplies bf16 matrices in hardware; without that fp32 is several times faster."""
    if _uses_cuda():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The names of PyTorch's own CPU capability checks; absent ones mean not supported.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


_store: RankStore | None = None


def connect_ranks(world: World, timeout_minutes: float = 30.0) -> None:
    """Connects this rank to the others' store, over which failures are reported from now on.

    Needs no device and no backend. JobError if rank 0 does not come within ``timeout_minutes``; UserError if
    no address is set, or another program listens there.
    """
    global _store
    if world.size == 1 or _store is not None:
        return
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal():
        raise UserError(
            f"WORLD_SIZE is {world.size}, but MASTER_ADDR {host!r} and MASTER_PORT {port!r} are not a valid "
            "address; start by deepspeed, torchrun or srun"
        )
    try:
        _store = RankStore(world.rank, world.size, timeout_minutes)
    except torch.distributed.DistNetworkError as error:
        # A SLURM job takes another port when it is requeued, as it is unless the user made a mistake.
        if "EADDRINUSE" not in str(error) or "SLURM_JOB_ID" in os.environ:
            raise JobError(f"port {port}, where the ranks meet: {one_line(error)}") from None
        raise UserError(
            f"port {port}, where the ranks meet, is in use, perhaps by another run; "
            "name another: deepspeed --master_port 29501, torchrun --master-port 29501"
        ) from None


def wait_for_ranks(timeout_minutes: float = 30.0) -> None:
    """Waits until all ranks are connected; JobError names those that did not come."""
    if _store is not None:
        _store.wait_for_all(timeout_minutes)


def on_abort(cleanup: Callable[[], object]) -> None:
    """Registers a function that is called before another rank's failure ends this process."""
    if _store is not None:
        _store.cleanups.append(cleanup)


def init_process_group(world: World, timeout_minutes: float = 30.0) -> None:
    """Connects all ranks and starts communication: NCCL on CUDA; gloo on the CPU, whose cores they share.

    ``timeout_minutes`` is how long a rank waits for the others before it fails.
    """
    connect_ranks(world, timeout_minutes)
    wait_for_ranks(timeout_minutes)
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # torchrun sets OMP_NUM_THREADS to 1, which would leave cores idle.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    else:
        visible = torch.cuda.device_count()
        if world.device.index >= visible:
            raise UserError(f"LOCAL_RANK {world.local_rank} on a node with {visible} visible GPUs")
        torch.cuda.set_device(world.device)
        # DeepSpeed takes its device from there.
        os.environ["LOCAL_RANK"] = str(world.device.index)
    import deepspeed

    # Where communication starts on a CPU, DeepSpeed compiles an all-reduce through shared memory, which only
    # its tensor-parallel inference calls. That takes half a minute, a compiler and ninja on the PATH, and a
    # compilation that was killed leaves a lock at which later ones wait for ever. Imported by name, because
    # the package's attribute ``torch`` is PyTorch.
    backend_module: Any = importlib.import_module("deepspeed.comm.torch")
    backend_module.build_shm_op = lambda: None
    # Decorates Muon's functions, which come with every optimizer: torch would load its compiler for a second.
    compiler_module: Any = importlib.import_module("deepspeed.runtime.compiler")
    compiler_module.compile = lambda: compiler_module.dummy_decorator
    # DeepSpeed calls collectives that torch 2.13 renames, at every step of every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if not torch.distributed.is_initialized():
        # A single rank needs no port, which another run could have taken.
        store = torch.distributed.HashStore() if _store is None else _store.store
        torch.distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    # DeepSpeed uses the process group that exists already.
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def set_timeout(minutes: float) -> None:
    """Sets how long collectives of all groups of this process may take from now on."""
    from torch.distributed import distributed_c10d

    # Public since torch 2.14, which warns of the old name.
    set_of_group: Any = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_of_group(timedelta(minutes=minutes), group)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class PendingSum:
    """Numbers that are being summed over all ranks, in double precision. Every rank must make and await it.

    On a GPU the sum goes there and back on a stream of its own, beside what the host launches meanwhile.
    """

    def __init__(self, values: list[float], device: torch.device) -> None:
        self._found = torch.tensor(values, dtype=torch.float64)
        self._finish: Callable[[], object] = lambda: None
        if not torch.distributed.is_initialized():
            return
        if device.type != "cuda":
            work = torch.distributed.all_reduce(self._found, async_op=True)
            self._finish = cast(torch.distributed.Work, work).wait
            return
        with torch.cuda.stream(stream := _side_stream(device)):
            sent = self._found.pin_memory().to(device, non_blocking=True)
            torch.distributed.all_reduce(sent)
            self._found = torch.empty_like(self._found, pin_memory=True).copy_(sent, non_blocking=True)
            self._finish = stream.record_event().synchronize

    def wait(self) -> list[float]:
        """The sums, when all ranks have sent their numbers."""
        self._finish()
        return self._found.tolist()


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sums numbers over all ranks, in double precision. Every rank must call it."""
    return PendingSum(values, device).wait()


def gather_to_main(items: list[Any], world: World) -> list[Any]:
    """Concatenates the ranks' lists on rank 0, in rank order; the others get an empty one. All must call it.

    Rank 0 waits for the slowest rank as long as it takes.
    """
    if _store is None:
        return items
    return [item for part in _store.gather(items) for item in part]


def on_main(world: World, function: Callable[[], Result]) -> Result:
    """Runs a function on rank 0 and returns its result on every rank. All must call it.

    It may take any time. Its result must pickle. If it raises a UserError, every rank does.
    """
    if _store is None:
        return function()

    def attempt() -> tuple[Any, str | None]:
        try:
            return function(), None
        except UserError as error:
            return None, str(error)

    result, mistake = _store.broadcast(attempt)
    if mistake is not None:
        raise UserError(mistake)
    return result


# --- stopping on request ---


class StopNow(BaseException):
    """Ends the process, and with it all ranks, with the code that asks for another start."""


def exit_on_signal() -> None:
    """Makes the stop signals end all ranks at once; for programs that resume when started again."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_now)


def _stop_now(number: int, frame: FrameType | None) -> NoReturn:
    # Once: many clusters signal both the shell, which passes it on, and the process.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # A library may catch what is raised here, in a callback: then the process is ended by force.
    timer = threading.Timer(30.0, os._exit, [REQUEUE_EXIT_CODE])
    timer.daemon = True
    timer.start()
    raise StopNow


# --- a program from its start to its exit code ---


def run_entry(main: Callable[[list[str]], int | None], *, distributed: bool = False) -> None:
    """Runs a program's ``main(argv)`` and exits; a user's mistake is one line and code 2.

    ``distributed``: its ranks connect, so a failure before that is reported to the others, too.

    On SIGUSR2 the process writes the stacks of its threads to the file that DEHVF_STACKS names, or to stderr,
    and continues; this also works while it hangs in a collective.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file's name or a caption may contain what the console's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stacks = os.environ.get("DEHVF_STACKS")
    # The file stays open: a process that hangs or has no descriptors left cannot open it.
    faulthandler.register(signal.SIGUSR2, file=Path(stacks).open("a") if stacks else sys.stderr)  # noqa: SIM115
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed warns that it found none, also where a library imports it without need.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    fail = partial(_fail, distributed=distributed)
    try:
        code = main(sys.argv[1:]) or 0
        if _store is not None and code in (0, REQUEUE_EXIT_CODE):
            _store.close()
    except UserError as error:
        code = fail(" ".join(str(error).split()), USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        code = fail("", 130)
    except StopNow:
        code = fail("", REQUEUE_EXIT_CODE)
    except JobError as error:
        code = fail(" ".join(str(error).split()), error.code)
    except torch.OutOfMemoryError as error:
        code = fail(f"out of GPU memory: {one_line(error)}", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            code = fail(one_line(error), 1)
        elif "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
            code = fail("another rank is gone without a message; the launcher may say why", 1)
        else:
            code = fail(one_line(error), 1, details=traceback.format_exc())
    _exit(code)


def _fail(line: str, code: int, *, distributed: bool, details: str = "") -> int:
    """Reports why this rank ends; returns the code that all ranks end with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if distributed and _store is None:
        # It failed before the ranks were connected: the others are on their way, or fail alike.
        with suppress(UserError, JobError, torch.distributed.DistError):
            connect_ranks(read_world(), timeout_minutes=2)

    def explain() -> None:
        # The log may be on the disk that is full.
        with suppress(OSError):
            print(details, end="", file=sys.stderr, flush=True)

    if _store is not None:
        return _store.report_failure(line, code, details=explain)
    explain()
    rank = os.environ.get("RANK", "0")
    print_failure(Failure(int(rank) if rank.isdecimal() else 0, line, code))
    return code


def _exit(code: int) -> NoReturn:
    if _store is None and not torch.distributed.is_initialized():
        sys.exit(code)
    if code == 0 and torch.distributed.is_initialized():
        # After an error the other ranks may be gone, and this would wait for them.
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # Not sys.exit: in about one of ten runs a thread of torch or DeepSpeed still needs the interpreter while
    # it shuts down, and a finished run ended with "terminate called" and SIGABRT.
    os._exit(code)
