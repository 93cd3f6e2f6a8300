"""Where this process stands among others, and the few collectives that the trainer needs of its own."""

from __future__ import annotations

import errno
import faulthandler
import importlib
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from dehvf_ds.config import JobError, UserError
from dehvf_ds.rank_store import Failure, RankStore, short, tell

USER_ERROR_EXIT_CODE = 2
REQUEUE_EXIT_CODE = 85
"""Exit code of a run that saved itself on request: please start it again."""

# Of files that cannot be written or read: what went wrong is the machine's, and no traceback tells more.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's place in the job.

    Attributes:
        rank: number of this process among all.
        local_rank: number among those of its node.
        size: processes in the job.
        local_size: processes on this node.
        device: where this process computes.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes for all."""
        return self.rank == 0


def read_world(environ: dict[str, str] | None = None) -> World:
    """Finds out the process's place, whoever launched it; touches no device.

    ``deepspeed`` and ``torchrun`` set RANK and friends; ``srun`` sets SLURM_*, which is mapped to them in the
    environment (``environ``, None for the process's own), since DeepSpeed reads them there; alone means one
    process.
    """
    env = os.environ if environ is None else environ
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env["LOCAL_WORLD_SIZE"] = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
        # Below the ports that systems hand out themselves (32768 on Linux). Jobs on one node do not collide,
        # and a job that is started again takes another one.
        job, restart = (int(env.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "RESTART_COUNT"))
        env.setdefault("MASTER_PORT", str(10000 + (job + 7919 * restart) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))
    try:
        rank, size, local_rank, local_size = (
            int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
    except ValueError as error:
        raise UserError(
            f"RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is not a number: {error}"
        ) from None
    # Nodes may have unlike numbers of ranks, and SLURM tells the first one's.
    if not (0 <= rank < size and local_rank >= 0 and local_size >= 1):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}: no "
            "such place; start by deepspeed, torchrun or srun, or unset all four"
        )
    return World(rank, local_rank, size, local_size, _device(local_rank, env))


def _device(local_rank: int, env: Mapping[str, str]) -> torch.device:
    if not _uses_cuda(env):
        return torch.device("cpu")
    # Of several tasks on a node each may see its own alone (srun --gpus-per-task, --gpu-bind).
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)


def _uses_cuda(environ: Mapping[str, str]) -> bool:
    return torch.cuda.is_available() and environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def first_host(nodelist: str) -> str:
    """The first node of SLURM's short form, where rank 0 runs: ``gpu[003-004,7],cpu1`` is ``gpu003``."""
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodelist)
    return first.partition(",")[0]


_store: RankStore | None = None


def meet(world: World, timeout_minutes: float = 30.0) -> None:
    """Lets the ranks hear of each other's failures from here on; no device and no backend is needed.

    Waits ``timeout_minutes`` for rank 0 (then JobError); UserError if nothing says where the ranks meet, or
    if another program listens there.
    """
    global _store
    if world.size == 1 or _store is not None:
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world.size} and {name} is not set; start by deepspeed, torchrun or srun"
            )
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal():
        raise UserError(f"MASTER_PORT is {port!r}, not a number")
    try:
        _store = RankStore(world.rank, world.size, timeout_minutes)
    except torch.distributed.DistNetworkError as error:
        # A job of SLURM meets elsewhere when it is started again, as it is after any error but a mistake.
        if "EADDRINUSE" not in str(error) or "SLURM_JOB_ID" in os.environ:
            raise JobError(f"port {port}, where the ranks meet: {short(error)}") from None
        raise UserError(
            f"port {port}, where the ranks meet, is in use, perhaps by another run; "
            "name another: deepspeed --master_port 29501, torchrun --master-port 29501"
        ) from None


def wait_for_ranks(timeout_minutes: float = 30.0) -> None:
    """Waits until all have met; JobError names those that did not come."""
    if _store is not None:
        _store.wait_for_all(timeout_minutes)


def before_end(cleanup: Callable[[], object]) -> None:
    """Has a function called before another rank's failure ends this process."""
    if _store is not None:
        _store.cleanups.append(cleanup)


def init_process_group(world: World, timeout_minutes: float = 30.0) -> None:
    """Starts communication: NCCL on CUDA, gloo on the CPU, where threads are shared out among the ranks.

    ``timeout_minutes`` is how long a rank waits for the others before it fails. Ranks that have not met do so
    first.
    """
    meet(world, timeout_minutes)
    wait_for_ranks(timeout_minutes)
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # torchrun sets OMP_NUM_THREADS to 1; every core counts on a CPU run.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    else:
        visible = torch.cuda.device_count()
        if world.device.index >= visible:
            raise UserError(f"LOCAL_RANK {world.local_rank} on a node with {visible} visible GPUs")
        torch.cuda.set_device(world.device)
        # DeepSpeed takes its device from there.
        os.environ["LOCAL_RANK"] = str(world.device.index)
    import deepspeed

    _compile_nothing()
    # DeepSpeed calls collectives that torch 2.13 renames, at every step of every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if not torch.distributed.is_initialized():
        # A single rank meets nobody, so it takes no port that another run could have.
        store = torch.distributed.HashStore() if _store is None else _store.store
        torch.distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    # Finds that communication has started, and takes it for its own.
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _compile_nothing() -> None:
    """Keeps DeepSpeed from compiling an all-reduce through shared memory where communication starts on a CPU.

    Its tensor-parallel inference alone calls that one, training never. Compiling takes half a minute, a
    compiler and ninja on the PATH, and one that was killed leaves a lock at which later ones wait for ever.
    """
    # Not by an import statement: the package's attribute of that name is PyTorch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def set_timeout(minutes: float) -> None:
    """Sets how long a collective may take from now on, in every group of this process."""
    from torch.distributed import distributed_c10d

    # Public since torch 2.14, which warns of the old name.
    set_of_group: Any = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_of_group(timedelta(minutes=minutes), group)


def has_fast_bf16() -> bool:
    """Whether this device multiplies bf16 matrices in hardware; without that fp32 is several times faster."""
    if _uses_cuda(os.environ):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The names of PyTorch's own CPU capability checks; absent ones mean not supported.
    checks = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check is not None and check() for check in checks)


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sums numbers over all ranks, in double precision. Every rank must call it."""
    if not torch.distributed.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def gather_to_main(items: list[Any], world: World) -> list[Any]:
    """Joins every rank's list on rank 0, in rank order; other ranks get an empty list. All must call it.

    Rank 0 waits for the slowest rank as long as it takes.
    """
    if _store is None:
        return items
    return [item for part in _store.gather(items) for item in part]


def on_main(world: World, function: Callable[[], Result]) -> Result:
    """Runs a function on rank 0 and gives its result to all, however long that takes. All must call it.

    The result must pickle. A UserError of the function is raised on every rank.
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


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds torch's generators from where the run stands, so that no generator state need be saved.

    Ranks and micro-steps draw different dropout masks; the same place in a run draws the same ones.
    """
    entropy = np.random.SeedSequence([seed & (2**64 - 1), step, micro_step, rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def barrier() -> None:
    """Waits for all ranks, where there are any."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def run_entry(main: Callable[[list[str]], int | None], *, meets: bool = False) -> None:
    """Runs an entry's ``main(argv)`` and exits; a user's mistake is one line and code 2.

    ``meets``: its ranks ``meet``, so that a failure before that is told to the others all the same.

    On SIGUSR2 the process tells where each of its threads is, in the file that DEHVF_STACKS names or on
    stderr, and continues: also where it hangs in a collective, so that nothing of Python runs.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file's name or a caption may hold what the console's encoding lacks; that must end nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stacks = os.environ.get("DEHVF_STACKS")
    # The file stays open: a process that hangs or has no descriptors left opens none.
    faulthandler.register(signal.SIGUSR2, file=Path(stacks).open("a") if stacks else sys.stderr)  # noqa: SIM115
    _quiet_libraries()
    fail = partial(_fail, meets=meets)
    try:
        code = main(sys.argv[1:]) or 0
        if _store is not None and code in (0, REQUEUE_EXIT_CODE):
            _store.leave()
    except UserError as error:
        code = fail(" ".join(str(error).split()), USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        code = fail("", 130)
    except StopNow:
        code = fail("", REQUEUE_EXIT_CODE)
    except JobError as error:
        code = fail(" ".join(str(error).split()), error.code)
    except torch.OutOfMemoryError as error:
        code = fail(f"out of GPU memory: {short(error)}", 1)
    except Exception as error:
        if _is_of_the_machine(error):
            code = fail(short(error), 1)
        elif "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
            code = fail("another rank is gone without a word, killed perhaps; the launcher may know", 1)
        else:
            code = fail(short(error), 1, details=traceback.format_exc())
    _leave(code)


class StopNow(BaseException):
    """Ends the process, and with it all ranks, with the code that asks for another start."""


def _num_ranks() -> int:
    with suppress(UserError):
        return read_world().size
    return 1


def _is_of_the_machine(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def _fail(line: str, code: int, *, meets: bool, details: str = "") -> int:
    """Tells why this rank ends; returns the code that all end with."""
    # It ends already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if meets and _store is None and _num_ranks() > 1:
        # It failed before the ranks met: the others are on their way there, or fail alike.
        with suppress(UserError, JobError, torch.distributed.DistError):
            meet(read_world(), timeout_minutes=2)

    def explain() -> None:
        # The log may lie on the disk that is full.
        with suppress(OSError):
            print(details, end="", file=sys.stderr, flush=True)

    if _store is not None:
        return _store.fail(line, code, details=explain)
    explain()
    rank = os.environ.get("RANK", "0")
    tell(Failure(int(rank) if rank.isdecimal() else 0, line, code))
    return code


def _quiet_libraries() -> None:
    """Leaves bars of weights being loaded to the one rank that has a terminal; tells DeepSpeed the device."""
    if not torch.cuda.is_available():
        # Untold, it warns that it found no GPU, also where a library imports it that needs nothing of it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _leave(code: int) -> None:
    if _store is None and not torch.distributed.is_initialized():
        sys.exit(code)
    if code == 0 and torch.distributed.is_initialized():
        # After an error the other ranks may be gone, and this would wait for them.
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # Not sys.exit: in one of some ten runs a thread of torch or DeepSpeed still wants the interpreter
    # while it is torn down, and a finished run ended with "terminate called" and SIGABRT.
    os._exit(code)
