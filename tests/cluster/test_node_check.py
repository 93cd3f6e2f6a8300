"""Which node is sick: decided from reports, and by two tasks that communicate."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from slurm.cluster import wait_for

from dehvf_ds.cluster import node_check
from dehvf_ds.cluster.node_check import HealthReport, TaskReport, judge_communication, judge_looks
from dehvf_ds.distributed import World

NODES = ["n1", "n2", "n3"]


def reports(stage="looked", **changes: dict) -> list[TaskReport]:
    """Two tasks on each of three nodes; ``changes`` are of a node's second task."""
    same = {"stage": stage, "facts": {"torch": "2.9"}, "problems": {}}
    return [
        TaskReport(node, 2 * number + local, **(same | (changes.get(node, {}) if local else {})))
        for number, node in enumerate(NODES)
        for local in range(2)
    ]


def sick(found: list[TaskReport], nodes=NODES) -> dict[str, str]:
    health = judge_looks(found, nodes, 2)
    assert health.code == (3 if health.sick else 0)
    return dict(health.sick)


def test_nodes_that_are_silent_or_unlike_the_others_are_sick() -> None:
    assert sick(reports()) == {}
    assert sick(reports()[:-1]) == {"n3": "1 of 2 tasks did not start, or hang"}
    odd = {"facts": {"torch": "2.8"}}
    assert sick(reports(n1=odd)) == {"n1": "torch: 2.8 and 2.9, elsewhere 2.9"}
    # Of two nodes the first is taken for the right one.
    assert list(sick(reports(n2=odd)[:4], NODES[:2])) == ["n2"]


def test_a_problem_of_some_nodes_is_theirs_and_of_all_a_mistake() -> None:
    full = {"problems": {"temporary files": "/tmp: 0 MiB free"}}
    assert sick(reports(n2=full)) == {"n2": "temporary files: /tmp: 0 MiB free"}
    everywhere = reports(n1=full, n2=full, n3=full)
    health = judge_looks(everywhere, NODES, 2)
    assert health == HealthReport(mistake="/tmp: 0 MiB free (temporary files, on every node)")
    assert (health.code, str(health)) == (2, f"error: {health.mistake}\n")
    # A node that says nothing does not make the others' mistake a sickness.
    assert judge_looks(everywhere[:-1], NODES, 2).mistake


def test_who_does_not_communicate_is_sick_where_others_do() -> None:
    assert judge_communication(reports("reduced"), NODES).code == 0
    cut_off = reports("connected", n3={"stage": "looked"})
    assert judge_communication(cut_off, NODES).sick == {"n3": "does not reach n1"}
    assert list(judge_communication(reports("reduced", n2={"stage": "connected"}), NODES).sick) == ["n2"]
    nobody = judge_communication(reports("connected"), NODES)
    assert (nobody.code, nobody.sick) == (3, {})
    assert "did not end" in nobody.note


@pytest.mark.parametrize(
    ("local_rank", "free", "what", "found"),
    [(3, 0.5, "GPU 3", "37.3 of 74.5 GiB"), (8, 1, "GPUs", "8 visible, fewer"), (0, 1, "GPUs", "no GPU")],
)
def test_a_gpu_that_is_missing_or_in_use(monkeypatch, local_rank, free, what, found) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 80e9), int(80e9)))
    device = torch.device("cuda", local_rank) if local_rank else torch.device("cpu")
    line = node_check.check_gpu(World(local_rank, local_rank, 8, 8, device))
    assert (line.level, line.what) == ("FAIL", what)
    assert found in line.found


def environment(rank: int, port: int) -> dict[str, str]:
    """Of a task that is alone on its node; what asks for the CPU where GPUs are expected."""
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    return where | {"SLURMD_NODENAME": f"n{rank + 1}"}


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_tasks(folder: Path, port: int, flags: list[str], num: int = 2) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    command = [sys.executable, "-m", "dehvf_ds.cluster.node_check", "--into", str(folder)]
    command += ["--nodes", "n1,n2", "--tasks-per-node", "1", "--", *flags]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(command, env=os.environ | environment(rank, port), **piped) for rank in range(num)
    ]


def test_two_tasks_look_and_communicate(world: Path, tmp_path: Path, port: int) -> None:
    flags = ["--config", str(world / "recipe.yaml"), "--run_dir", str(tmp_path / "run")]
    tasks = start_tasks(tmp_path / "reports", port, [*flags, "--deepspeed", str(world / "ds.json")])
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 nodes ready; first all-reduce after" in outputs[0]


def test_a_signal_while_it_waits_asks_for_a_requeue(world: Path, tmp_path: Path, port: int) -> None:
    folder = tmp_path / "asked"
    (task,) = start_tasks(folder, port, ["--config", str(world / "recipe.yaml")], num=1)
    wait_for(lambda: list(folder.glob("*.json")), 120, "report")
    task.send_signal(signal.SIGUSR1)
    task.communicate(timeout=60)
    assert task.returncode == 85


def test_a_task_that_is_cut_off_is_named_by_the_deadline(
    tmp_path: Path, port: int, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(node_check, "look", lambda flags, world: ({}, {}))
    monkeypatch.setattr(node_check, "REDUCE_TIMEOUT_S", 2.0)
    for name, value in environment(0, port).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "n2.1.json").write_text(json.dumps(asdict(TaskReport("n2", 1, {}, {}))))
    child = os.fork()
    if child == 0:
        os._exit(node_check.NodeCheck(tmp_path, ["n1", "n2"], 1).run([]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == node_check.SICK_EXIT_CODE
    assert (tmp_path / "sick").read_text() == "n2\n"
    assert "error: node n2 is sick: does not reach n1" in capfd.readouterr().err
