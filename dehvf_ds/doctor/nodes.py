"""Is every node of a SLURM job ready? Every task looks at its own, and the first tells which node is not.

    srun python -m dehvf_ds.doctor.nodes --into DIR --nodes n1,n2 --tasks-per-node 8 -- FLAGS OF train.py

Exit codes: 0 ready, 2 a mistake that every node shows, 3 sick nodes, whose names then lie in ``DIR/sick``, 85
asked to stop by SIGTERM or SIGUSR1.
Reports are files in a folder that all nodes share, not messages: a node that hangs or is cut off must be told
from those that wait for it. Ours; clusters' own checks (SLURM's HealthCheckProgram) look at the machine, not
at the run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from dehvf_ds.doctor import machine, packages
from dehvf_ds.doctor.report import GIB, Check, run_check
from dehvf_ds.doctor.run import run_checks
from dehvf_ds.doctor.verdict import Report, Stage, Verdict, judge
from dehvf_ds.training.stop import REQUEUE_EXIT_CODE, StopNow, exit_on_request

SICK_EXIT_CODE = 3
MISTAKE_EXIT_CODE = 2
SICK_FILE = "sick"
GO_FILE = "go"

LOOK_S = 120.0
"""How long the first task waits for the others to look; on a cold file system imports alone take a minute."""

REDUCE_S = 120.0
"""How long an all-reduce may take, the start of communication included."""

REDUCED_BYTES = 64 << 20
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free; a process that outlived its job holds the rest."""


def main(argv: list[str]) -> int:
    """Looks, waits for the others, communicates; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dehvf_ds.doctor.nodes", allow_abbrev=False)
    parser.add_argument("--into", type=Path, required=True, help="an empty folder that all nodes share")
    parser.add_argument("--nodes", required=True, help="the job's nodes, with commas between them")
    parser.add_argument("--tasks-per-node", type=int, required=True)
    parser.add_argument("flags", nargs="*", help="the flags of train.py, after --")
    args = parser.parse_args(argv)
    exit_on_request()
    try:
        return Examination(args.into, args.nodes.split(","), args.tasks_per_node).run(args.flags)
    except StopNow:
        return REQUEUE_EXIT_CODE


class Examination:
    """One task's part."""

    def __init__(self, folder: Path, nodes: list[str], tasks_per_node: int) -> None:
        from dehvf_ds.distributed import read_world

        self._folder, self._nodes, self._tasks_per_node = folder, nodes, tasks_per_node
        self._world = read_world()
        node = os.environ.get("SLURMD_NODENAME", platform.node())
        self._report = Report(node=node, rank=self._world.rank, stage="started")

    def run(self, flags: list[str]) -> int:
        """Goes through all stages; returns the exit code."""
        self._write()
        facts, problems = look(flags, self._world)
        self._reach("looked", facts, problems)
        if (code := self._wait_for_go()) is not None:
            return code
        # A collective that hangs cannot be interrupted: the verdict comes from beside it.
        deadline = threading.Timer(REDUCE_S, lambda: os._exit(self._conclude("reduced")))
        deadline.daemon = True
        deadline.start()
        started = time.monotonic()
        try:
            communicate(self._world, lambda: self._reach("connected"))
        except Exception:
            traceback.print_exc()
            # The others fail as well, or wait until the deadline; so does who judges.
            if not self._world.is_main:
                return SICK_EXIT_CODE
        else:
            self._reach("reduced")
            if not self._world.is_main:
                return 0
        seconds = time.monotonic() - started
        self._wait_for_all("reduced", REDUCE_S - seconds)
        code = self._conclude("reduced")
        if code == 0:
            count = f"{len(self._nodes)} nodes" if len(self._nodes) > 1 else "the node"
            print(f"{count} ready; first all-reduce after {seconds:.1f} s", flush=True)
        return code

    def _wait_for_go(self) -> int | None:
        """Waits for the first task's word; the exit code if it is no."""
        if self._world.is_main:
            self._wait_for_all("looked", LOOK_S)
            code = self._conclude("looked")
            (self._folder / GO_FILE).write_text(str(code), encoding="utf-8")
            return code or None
        end = time.monotonic() + 2 * LOOK_S
        while time.monotonic() < end:
            try:
                text = (self._folder / GO_FILE).read_text(encoding="utf-8")
            except FileNotFoundError:
                text = ""
            if text:
                return int(text) or None
            time.sleep(0.5)
        return SICK_EXIT_CODE

    def _conclude(self, stage: Stage) -> int:
        """Judges and says it, where this is the first task; returns the exit code."""
        if not self._world.is_main:
            return SICK_EXIT_CODE
        verdict = judge(read_reports(self._folder), self._nodes, self._tasks_per_node, stage)
        for line in describe(verdict):
            print(line, file=sys.stderr, flush=True)
        if verdict.is_ready:
            return 0
        if verdict.mistake:
            return MISTAKE_EXIT_CODE
        (self._folder / SICK_FILE).write_text("".join(f"{node}\n" for node in verdict.sick), encoding="utf-8")
        return SICK_EXIT_CODE

    def _wait_for_all(self, stage: Stage, seconds: float) -> None:
        done = {"looked": {"looked", "connected", "reduced"}, "reduced": {"reduced"}}[stage]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            reports = read_reports(self._folder)
            if sum(report.stage in done for report in reports) >= len(self._nodes) * self._tasks_per_node:
                return
            time.sleep(0.5)

    def _reach(
        self, stage: Stage, facts: dict[str, str] | None = None, problems: dict[str, str] | None = None
    ) -> None:
        self._report = replace(
            self._report,
            stage=stage,
            facts=self._report.facts if facts is None else facts,
            problems=self._report.problems if problems is None else problems,
        )
        self._write()

    def _write(self) -> None:
        # By renaming: who reads it finds a whole one.
        path = self._folder / f"{self._report.node}.{self._report.rank}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self._report)), encoding="utf-8")
        part.replace(path)


def read_reports(folder: Path) -> list[Report]:
    """The reports so far, by rank."""
    reports = []
    for path in folder.glob("*.json"):
        # On NFS one that is being replaced may be neither the old nor the new file; it is read the next time.
        with contextlib.suppress(OSError):
            reports.append(Report(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(reports, key=lambda report: report.rank)


def describe(verdict: Verdict) -> list[str]:
    """Lines for people."""
    if verdict.mistake:
        return [f"error: {verdict.mistake}"]
    lines = [f"error: node {node} is sick: {why}" for node, why in verdict.sick.items()]
    return lines + ([f"error: {verdict.note}"] if verdict.note else [])


def look(flags: list[str], world) -> tuple[dict[str, str], dict[str, str]]:
    """What this node has: facts that must be the same everywhere, and problems."""
    from dehvf_ds.config import UserError, find_deepspeed_json, parse_run_config, to_plain

    facts, problems = environment_facts(), {}
    checks: list[Check] = []
    try:
        config = parse_run_config(flags)
    except UserError as error:
        problems["configuration"] = str(error)
    else:
        facts["configuration"] = _digest(json.dumps(to_plain(config), sort_keys=True).encode())
        # One that is missing is told by the checks of the run.
        with contextlib.suppress(UserError):
            facts["DeepSpeed JSON"] = _digest(find_deepspeed_json(config.deepspeed).read_bytes())
        # One task a node: thousands of GPUs asking for the size of every shard would be a load of its own.
        if world.local_rank == 0:
            checks += run_checks(config)
    if world.local_rank == 0:
        checks += _node_checks()
    for check in checks:
        for line in run_check(check):
            if line.level == "FAIL":
                problems.setdefault(line.what, line.found)
    try:
        problems |= gpu_problems(world)
    except Exception as error:
        problems["GPU"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return facts, problems


def environment_facts() -> dict[str, str]:
    """Versions, the code itself, and the GPUs."""
    import torch

    facts = {"Python": platform.python_version()}
    for requirement in packages.read_requirements():
        name = packages.parse_requirement(requirement).name
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    root = Path(__file__).parents[1]
    sources = sorted([*root.rglob("*.py"), *root.rglob("*.yaml")])
    facts["code"] = _digest(*(path.read_bytes() for path in sources))
    facts["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        from torch.cuda import nccl

        facts["NCCL"] = ".".join(map(str, nccl.version()))
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    else:
        facts["GPUs"] = "none"
    return facts


def gpu_problems(world) -> dict[str, str]:
    """What is wrong with this task's GPU: not there, in use by another, or computing wrong."""
    import torch

    if world.device.type == "cpu":
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return {}
        return {"GPUs": "no GPU is visible (DS_ACCELERATOR=cpu computes on the CPU)"}
    if world.device.index >= torch.cuda.device_count():
        return {"GPUs": f"{torch.cuda.device_count()} visible, fewer than tasks on the node"}
    free, total = torch.cuda.mem_get_info(world.device)
    if free < FREE_SHARE * total:
        used = f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB"
        return {f"GPU {world.local_rank}": f"{used} of its memory are in use by something else"}
    ones = torch.ones(4096, 4096, device=world.device, dtype=torch.bfloat16)
    # A power of two, which bf16 has exactly.
    if not bool(((ones @ ones) == 4096).all()):
        return {f"GPU {world.local_rank}": "a product of matrices of ones came out wrong"}
    return {}


def communicate(world, on_connected: Callable[[], None]) -> None:
    """Meets at the first node and sums a tensor over all tasks, twice.

    Args:
        world: this task's place.
        on_connected: called once the first node was reached.

    Raises:
        RuntimeError: torch's, where a connection breaks or is not made in time.
    """
    import torch
    from torch import distributed

    timeout = timedelta(seconds=REDUCE_S)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(
        address, port, world.size, is_master=world.is_main, timeout=timeout, wait_for_workers=False
    )
    on_connected()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    tensor = torch.ones(REDUCED_BYTES // 4, device=world.device)
    for _ in range(2):
        distributed.all_reduce(tensor)
    expected = float(world.size) ** 2
    if not bool((tensor == expected).all()):
        raise RuntimeError(f"an all-reduce of ones gave {tensor.unique().tolist()[:4]}, not {expected:g}")
    distributed.destroy_process_group()


def _node_checks() -> Iterator[Check]:
    yield Check("packages", packages.check_packages)
    yield Check("torch build", machine.check_torch)
    yield Check("shared memory", machine.check_shared_memory)
    yield Check("open files", machine.check_open_files)
    yield Check("temporary files", machine.check_temporary_space)


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
