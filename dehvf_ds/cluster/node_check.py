"""Checks the nodes of a SLURM job: every task examines its own node, and the first names those that are sick.

    srun python -m dehvf_ds.cluster.node_check --into DIR --nodes n1,n2 --tasks-per-node 8 -- FLAGS

Exit codes: 0 ready, 2 a mistake on every node, 3 sick nodes, named in ``DIR/sick``, 85 stopped by SIGTERM or
SIGUSR1. Reports are files in a shared directory, not messages, so that a node that hangs or is cut off can be
told apart from those that wait for it. A cluster's own checks (SLURM's HealthCheckProgram) test the machine,
not the run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import distributed
from torch.cuda import nccl

from dehvf_ds.cluster import environment
from dehvf_ds.config import UserError, find_deepspeed_json, parse_run_config, to_plain
from dehvf_ds.distributed import (
    REQUEUE_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    StopNow,
    World,
    exit_on_signal,
    read_world,
)

SICK_EXIT_CODE = 3
REPORT_TIMEOUT_S = REDUCE_TIMEOUT_S = 120.0
"""Time limits for the reports on the nodes (imports take a minute on a cold file system), and for connecting
and an all-reduce."""

REDUCED_BYTES = 64 << 20
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free; a process that outlived its job would hold the rest."""


@dataclass(frozen=True)
class TaskReport:
    """A task's report: by name, facts that must be the same on all nodes, and problems that prevent a run."""

    node: str
    rank: int
    facts: Mapping[str, str]
    problems: Mapping[str, str]
    stage: Literal["started", "looked", "connected", "reduced"] = "looked"
    """its progress: started, examined its node, reached the first node, finished an all-reduce"""


@dataclass(frozen=True)
class HealthReport:
    """The conclusion from all tasks' reports."""

    mistake: str = ""
    """a problem of every node, which other nodes would not solve"""
    sick: Mapping[str, str] = field(default_factory=dict)
    """nodes to exclude, and why"""
    note: str = ""
    """a problem of an unknown node"""

    @property
    def code(self) -> int:
        """The exit code."""
        return USER_ERROR_EXIT_CODE if self.mistake else SICK_EXIT_CODE if self.sick or self.note else 0

    def __str__(self) -> str:
        lines = [self.mistake, *(f"node {node} is sick: {why}" for node, why in self.sick.items()), self.note]
        return "".join(f"error: {line}\n" for line in lines if line)


def judge_looks(reports: Sequence[TaskReport], nodes: Sequence[str], num_tasks: int) -> HealthReport:
    """Separates sick nodes from a mistake on every node; each should have ``num_tasks`` reports."""
    looked = [report for report in reports if report.stage != "started"]
    tasks = {node: [report for report in looked if report.node == node] for node in nodes}
    whole = {node: found for node, found in tasks.items() if len(found) == num_tasks}
    sick = {
        node: f"{num_tasks - len(found)} of {num_tasks} tasks did not start, or hang"
        for node, found in tasks.items()
        if node not in whole
    }
    for name in dict.fromkeys(
        name for found in whole.values() for report in found for name in report.problems
    ):
        texts = {node: next(filter(None, (r.problems.get(name) for r in f)), "") for node, f in whole.items()}
        if all(texts.values()):
            return HealthReport(mistake=f"{next(iter(texts.values()))} ({name}, on every node)")
        for node, text in texts.items():
            if text:
                sick.setdefault(node, f"{name}: {text}")
    for name in dict.fromkeys(name for found in whole.values() for report in found for name in report.facts):
        values = {n: " and ".join(sorted({r.facts.get(name, "none") for r in f})) for n, f in whole.items()}
        # Among equally common values the first node's.
        common = Counter(values.values()).most_common(1)[0][0]
        for node, value in values.items():
            if value != common:
                sick.setdefault(node, f"{name}: {value}, elsewhere {common}")
    return HealthReport(sick=sick)


def judge_communication(reports: Sequence[TaskReport], nodes: Sequence[str]) -> HealthReport:
    """Finds sick nodes by how far their tasks came in an all-reduce."""
    behind = dict.fromkeys(report.node for report in reports if report.stage != "reduced")
    cut_off = dict.fromkeys(report.node for report in reports if report.stage == "looked")
    if 0 < len(cut_off) < len(nodes):
        return HealthReport(sick=dict.fromkeys(cut_off, f"does not reach {nodes[0]}"))
    if 0 < len(behind) < len(nodes):
        return HealthReport(sick=dict.fromkeys(behind, "did not end an all-reduce that ended elsewhere"))
    missing = "an all-reduce over all nodes did not end; see the ranks' logs"
    return HealthReport(note=missing if behind else "")


class NodeCheck:
    """The check in one task; the first task decides."""

    def __init__(self, folder: Path, nodes: Sequence[str], tasks_per_node: int) -> None:
        self._folder, self._nodes, self._tasks_per_node = folder, nodes, tasks_per_node
        self._world = read_world()

    def run(self, flags: list[str]) -> int:
        """Examines the node, waits for the others, communicates; returns the exit code."""
        world, node = self._world, os.environ.get("SLURMD_NODENAME", platform.node())
        # Written first, as the examination may hang in a file system.
        self._report = TaskReport(node, world.rank, {}, {})
        self._reach("started")
        self._report = TaskReport(node, world.rank, *look(flags, world))
        self._reach("looked")
        if code := self._wait_for_go():
            return code
        # A collective that hangs cannot be interrupted, but a thread can end the process.
        deadline = threading.Timer(REDUCE_TIMEOUT_S, lambda: os._exit(self._judge_communication()))
        deadline.daemon = True
        deadline.start()
        started = time.monotonic()
        try:
            communicate(world, lambda: self._reach("connected"))
            self._reach("reduced")
        except Exception:
            # The others fail, too, or wait until the deadline.
            traceback.print_exc()
        deadline.cancel()
        seconds = time.monotonic() - started
        if world.is_main:
            self._wait_for_all({"reduced"}, REDUCE_TIMEOUT_S - seconds)
        # If a failed task ended now, the supervisor would kill the first before it has decided (LINGER_S).
        while self._report.stage != "reduced" and not (world.is_main or (self._folder / "sick").exists()):
            if time.monotonic() > started + 2 * REDUCE_TIMEOUT_S:
                break
            time.sleep(0.5)
        code = self._judge_communication()
        if world.is_main and code == 0:
            print(f"{len(self._nodes)} nodes ready; first all-reduce after {seconds:.1f} s", flush=True)
        return code

    def _judge_communication(self) -> int:
        if self._world.is_main:
            return self._tell(judge_communication(read_reports(self._folder), self._nodes))
        return 0 if self._report.stage == "reduced" else SICK_EXIT_CODE

    def _wait_for_go(self) -> int:
        """Waits for the first task's decision; returns 0 to continue, or an exit code."""
        go = self._folder / "go"
        if self._world.is_main:
            self._wait_for_all({"looked", "connected", "reduced"}, REPORT_TIMEOUT_S)
            code = self._tell(judge_looks(read_reports(self._folder), self._nodes, self._tasks_per_node))
            go.write_text(str(code), encoding="utf-8")
            return code
        end = time.monotonic() + 2 * REPORT_TIMEOUT_S
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return int(go.read_text(encoding="utf-8"))
            time.sleep(0.5)
        return SICK_EXIT_CODE

    def _tell(self, health: HealthReport) -> int:
        print(health, end="", file=sys.stderr, flush=True)
        if health.code == SICK_EXIT_CODE:
            names = "".join(f"{node}\n" for node in health.sick)
            (self._folder / "sick").write_text(names, encoding="utf-8")
        return health.code

    def _wait_for_all(self, stages: set[str], seconds: float) -> None:
        end, num_tasks = time.monotonic() + seconds, len(self._nodes) * self._tasks_per_node
        while time.monotonic() < end:
            if sum(report.stage in stages for report in read_reports(self._folder)) >= num_tasks:
                return
            time.sleep(0.5)

    def _reach(self, stage: Literal["started", "looked", "connected", "reduced"]) -> None:
        self._report = replace(self._report, stage=stage)
        # By renaming, so that nobody reads half a report.
        path = self._folder / f"{self._report.node}.{self._report.rank}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self._report)), encoding="utf-8")
        part.replace(path)


def read_reports(folder: Path) -> list[TaskReport]:
    """The reports so far, sorted by rank."""
    reports = []
    for path in folder.glob("*.json"):
        # On NFS a file may be missing while it is replaced; the next call reads it.
        with contextlib.suppress(OSError):
            reports.append(TaskReport(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(reports, key=lambda report: report.rank)


def look(flags: list[str], world: World) -> tuple[dict[str, str], dict[str, str]]:
    """Examines this node; returns facts that must be the same on all nodes, and problems."""
    names = [needed.name for needed in environment.read_requirements()]
    facts = {name: environment.installed_version(name) or "not installed" for name in names}
    root = Path(__file__).parents[1]
    facts["code"] = _digest(*(p.read_bytes() for p in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")])))
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    facts["GPUs"] = ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "none"
    facts["CUDA, NCCL"] = f"{torch.version.cuda}, {nccl.version() if gpus else None}"
    problems, checks = {}, list(environment.node_checks())
    try:
        config = parse_run_config(flags)
    except UserError as error:
        problems["configuration"] = str(error)
    else:
        facts["configuration"] = _digest(json.dumps(to_plain(config), sort_keys=True).encode())
        # The checks of the run report a missing file.
        with contextlib.suppress(UserError):
            facts["DeepSpeed JSON"] = _digest(find_deepspeed_json(config.deepspeed).read_bytes())
        checks += environment.run_checks(config)
    # By one task a node: thousands of tasks would overload the file system with the sizes of all shards.
    for check in [*(checks if world.local_rank == 0 else ()), ("GPUs", lambda: check_gpu(world))]:
        for line in environment.run_check(check):
            if line.level == "FAIL":
                problems.setdefault(line.what, line.found)
    return facts, problems


def check_gpu(world: World) -> environment.Line | str:
    """Whether this task's GPU exists, is free and computes correctly."""
    if world.device.type == "cpu":
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            return "not used"
        return environment.Line("FAIL", "GPUs", "no GPU is visible (DS_ACCELERATOR=cpu computes on the CPU)")
    if world.device.index >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} visible, fewer than tasks on the node"
        return environment.Line("FAIL", "GPUs", found)
    name = f"GPU {world.local_rank}"
    free, total = torch.cuda.mem_get_info(world.device)
    if free < FREE_SHARE * total:
        used = f"{(total - free) / environment.GIB:.1f} of {total / environment.GIB:.1f} GiB"
        return environment.Line("FAIL", name, f"{used} of its memory are in use by another process")
    ones = torch.ones(4096, 4096, device=world.device, dtype=torch.bfloat16)
    # A power of two, which is exact in bf16.
    if not bool(((ones @ ones) == 4096).all()):
        return environment.Line("FAIL", name, "it multiplied matrices of ones incorrectly")
    return "works"


def communicate(world: World, on_connected: Callable[[], None]) -> None:
    """Connects to the first node and sums a tensor over all tasks, twice."""
    timeout, backend = timedelta(seconds=REDUCE_TIMEOUT_S), "gloo"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(
        address, port, world.size, world.is_main, timeout=timeout, wait_for_workers=False
    )
    on_connected()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend = "nccl"
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


def main(argv: list[str]) -> int:
    """Checks this task's node; returns the exit code."""
    parser = argparse.ArgumentParser("python -m dehvf_ds.cluster.node_check", allow_abbrev=False)
    parser.add_argument("--into", type=Path, required=True, help="an empty directory that all nodes share")
    parser.add_argument("--nodes", required=True, help="the job's nodes, separated by commas")
    parser.add_argument("--tasks-per-node", type=int, required=True)
    parser.add_argument("flags", nargs="*", help="the flags of train.py, after --")
    args = parser.parse_args(argv)
    exit_on_signal()
    try:
        return NodeCheck(args.into, args.nodes.split(","), args.tasks_per_node).run(args.flags)
    except StopNow:
        return REQUEUE_EXIT_CODE


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
