"""Is every node of a SLURM job ready? Every task looks at its own, and the first tells which node is not.

    srun python -m dehvf_ds.cluster.node_check --into DIR --nodes n1,n2 --tasks-per-node 8 -- FLAGS

Exit codes: 0 ready, 2 a mistake that every node shows, 3 sick nodes, whose names then lie in ``DIR/sick``, 85
asked to stop by SIGTERM or SIGUSR1. Reports are files in a folder that all nodes share, not messages: a node
that hangs or is cut off must be told from those that wait for it. Ours; a cluster's own checks (SLURM's
HealthCheckProgram) look at the machine, not at the run.
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
LOOK_S = REDUCE_S = 120.0
"""How long tasks may look at their nodes (on a cold file system imports alone take a minute), and how long an
all-reduce may take, the start of communication included."""

REDUCED_BYTES = 64 << 20
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free; a process that outlived its job holds the rest."""


@dataclass(frozen=True)
class TaskReport:
    """What one task says.

    Attributes:
        stage: how far it came: began, looked at its node, reached the first node, ended an all-reduce.
        facts: what must be the same everywhere, by name.
        problems: what no run can work with, by name.
    """

    node: str
    rank: int
    facts: Mapping[str, str]
    problems: Mapping[str, str]
    stage: Literal["started", "looked", "connected", "reduced"] = "looked"


@dataclass(frozen=True)
class HealthReport:
    """What follows from all tasks' reports.

    Attributes:
        mistake: what is wrong on every node alike, so that no other node would help.
        sick: nodes to leave out, and why.
        note: what is wrong without telling where.
    """

    mistake: str = ""
    sick: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        return USER_ERROR_EXIT_CODE if self.mistake else SICK_EXIT_CODE if self.sick or self.note else 0

    def __str__(self) -> str:
        lines = [self.mistake, *(f"node {node} is sick: {why}" for node, why in self.sick.items()), self.note]
        return "".join(f"error: {line}\n" for line in lines if line)


def judge_looks(reports: Sequence[TaskReport], nodes: Sequence[str], num_tasks: int) -> HealthReport:
    """Tells sick nodes from a mistake that every node shows.

    Args:
        reports: of every task that was heard of, by rank.
        nodes: the job's nodes.
        num_tasks: tasks of each.
    """
    looked = [report for report in reports if report.stage != "started"]
    of = {node: [report for report in looked if report.node == node] for node in nodes}
    heard = [node for node in nodes if len(of[node]) == num_tasks]
    sick = {
        node: f"{num_tasks - len(of[node])} of {num_tasks} tasks did not start, or hang"
        for node in nodes
        if node not in heard
    }
    for name in dict.fromkeys(name for node in heard for report in of[node] for name in report.problems):
        texts = {node: next(filter(None, (r.problems.get(name) for r in of[node])), None) for node in heard}
        if all(texts.values()):
            return HealthReport(mistake=f"{texts[heard[0]]} ({name}, on every node)")
        for node, text in texts.items():
            if text:
                sick.setdefault(node, f"{name}: {text}")
    for name in dict.fromkeys(name for node in heard for report in of[node] for name in report.facts):
        values = {node: " and ".join(sorted({r.facts.get(name, "none") for r in of[node]})) for node in heard}
        # Of values that are equally common, the first node's.
        common = Counter(values.values()).most_common(1)[0][0]
        for node, value in values.items():
            if value != common:
                sick.setdefault(node, f"{name}: {value}, elsewhere {common}")
    return HealthReport(sick=sick)


def judge_communication(reports: Sequence[TaskReport], nodes: Sequence[str]) -> HealthReport:
    """The same of tasks that have all looked, and then met for an all-reduce."""
    behind = dict.fromkeys(report.node for report in reports if report.stage != "reduced")
    cut_off = dict.fromkeys(report.node for report in reports if report.stage == "looked")
    if 0 < len(cut_off) < len(nodes):
        return HealthReport(sick=dict.fromkeys(cut_off, f"does not reach {nodes[0]}"))
    if 0 < len(behind) < len(nodes):
        return HealthReport(sick=dict.fromkeys(behind, "did not end an all-reduce that ended elsewhere"))
    missing = "an all-reduce over all nodes did not end; the ranks' logs have its messages"
    return HealthReport(note=missing if behind else "")


class NodeCheck:
    """One task's part; the first task judges."""

    def __init__(self, folder: Path, nodes: Sequence[str], tasks_per_node: int) -> None:
        self._folder, self._nodes, self._tasks_per_node = folder, nodes, tasks_per_node
        self._world = read_world()

    def run(self, flags: list[str]) -> int:
        """Looks, waits for the others, communicates; returns the exit code."""
        world, node = self._world, os.environ.get("SLURMD_NODENAME", platform.node())
        # Before the look, which hangs where a file system does.
        self._report = TaskReport(node, world.rank, {}, {})
        self._reach("started")
        self._report = TaskReport(node, world.rank, *look(flags, world))
        self._reach("looked")
        if code := self._wait_for_go():
            return code
        # A collective that hangs cannot be interrupted: it is judged from beside it.
        deadline = threading.Timer(REDUCE_S, lambda: os._exit(self._judge_communication()))
        deadline.daemon = True
        deadline.start()
        started = time.monotonic()
        try:
            communicate(world, lambda: self._reach("connected"))
            self._reach("reduced")
        except Exception:
            # The others fail as well, or wait until the deadline.
            traceback.print_exc()
        deadline.cancel()
        seconds = time.monotonic() - started
        if world.is_main:
            self._wait_for_all({"reduced"}, REDUCE_S - seconds)
        # A task that failed and ended before the first has judged would take that one along (LINGER_S).
        while self._report.stage != "reduced" and not (world.is_main or (self._folder / "sick").exists()):
            if time.monotonic() > started + 2 * REDUCE_S:
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
        """Waits for the first task's word; 0 if it is to go on."""
        go = self._folder / "go"
        if self._world.is_main:
            self._wait_for_all({"looked", "connected", "reduced"}, LOOK_S)
            code = self._tell(judge_looks(read_reports(self._folder), self._nodes, self._tasks_per_node))
            go.write_text(str(code), encoding="utf-8")
            return code
        end = time.monotonic() + 2 * LOOK_S
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
        # By renaming: who reads it finds a whole one.
        path = self._folder / f"{self._report.node}.{self._report.rank}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self._report)), encoding="utf-8")
        part.replace(path)


def read_reports(folder: Path) -> list[TaskReport]:
    """The reports so far, by rank."""
    reports = []
    for path in folder.glob("*.json"):
        # On NFS one that is being replaced may be neither the old nor the new file; it is read the next time.
        with contextlib.suppress(OSError):
            reports.append(TaskReport(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(reports, key=lambda report: report.rank)


def look(flags: list[str], world: World) -> tuple[dict[str, str], dict[str, str]]:
    """What this node has: facts that must be the same everywhere, and problems."""
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
        # One that is missing is told by the checks of the run.
        with contextlib.suppress(UserError):
            facts["DeepSpeed JSON"] = _digest(find_deepspeed_json(config.deepspeed).read_bytes())
        checks += environment.run_checks(config)
    # One task a node: thousands of GPUs asking for the size of every shard would be a load of its own.
    for check in [*(checks if world.local_rank == 0 else ()), ("GPUs", lambda: check_gpu(world))]:
        for line in environment.run_check(check):
            if line.level == "FAIL":
                problems.setdefault(line.what, line.found)
    return facts, problems


def check_gpu(world: World) -> environment.Line | str:
    """This task's GPU: there, free, and computing right."""
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
        return environment.Line("FAIL", name, f"{used} of its memory are in use by something else")
    ones = torch.ones(4096, 4096, device=world.device, dtype=torch.bfloat16)
    # A power of two, which bf16 has exactly.
    if not bool(((ones @ ones) == 4096).all()):
        return environment.Line("FAIL", name, "a product of matrices of ones came out wrong")
    return "works"


def communicate(world: World, on_connected: Callable[[], None]) -> None:
    """Meets at the first node and sums a tensor over all tasks, twice.

    Raises:
        RuntimeError: torch's, where a connection breaks or is not made in time; ours for a wrong sum.
    """
    timeout, backend = timedelta(seconds=REDUCE_S), "gloo"
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
    parser.add_argument("--into", type=Path, required=True, help="an empty folder that all nodes share")
    parser.add_argument("--nodes", required=True, help="the job's nodes, with commas between them")
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
