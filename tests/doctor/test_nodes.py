"""Which node is sick: judged from reports, and over two tasks that look and communicate."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dehvf_ds.distributed import World
from dehvf_ds.doctor import nodes
from dehvf_ds.doctor.verdict import Report, Verdict, judge

NODES = ["n1", "n2", "n3"]


def reports(stage="reduced", **changes: dict) -> list[Report]:
    """Two tasks on each of three nodes; ``changes`` are of a node's second task."""
    return [
        Report(
            node=node,
            rank=2 * number + local,
            **({"stage": stage, "facts": {"torch": "2.9"}} | (changes.get(node, {}) if local else {})),
        )
        for number, node in enumerate(NODES)
        for local in range(2)
    ]


def test_nothing_is_wrong() -> None:
    assert judge(reports(), NODES, 2, "reduced").is_ready
    assert judge(reports("looked"), NODES, 2, "looked").is_ready


def test_a_node_that_is_silent_or_stuck_is_sick() -> None:
    assert judge(reports()[:-1], NODES, 2, "looked").sick == {"n3": "1 of 2 tasks did not start"}
    stuck = reports("looked", n2={"stage": "started"})
    assert judge(stuck, NODES, 2, "looked").sick == {"n2": "did not finish looking at itself"}


def test_a_problem_of_some_nodes_is_theirs_and_of_all_a_mistake() -> None:
    full = {"problems": {"temporary files": "/tmp: 0 MiB free"}}
    assert judge(reports(n2=full), NODES, 2, "looked").sick == {"n2": "temporary files: /tmp: 0 MiB free"}
    everywhere = reports(n1=full, n2=full, n3=full)
    verdict = judge(everywhere, NODES, 2, "looked")
    assert verdict == Verdict(mistake="/tmp: 0 MiB free (temporary files, on every node)")
    # A node that says nothing does not make the others' mistake a sickness.
    silent = [report for report in everywhere if report.node != "n3"]
    assert judge(silent, NODES, 2, "looked").mistake


def test_the_odd_one_out_is_sick() -> None:
    odd = {"facts": {"torch": "2.8"}}
    assert judge(reports(n1=odd), NODES, 2, "looked").sick == {"n1": "torch: 2.8 and 2.9, elsewhere 2.9"}
    pair = [report for report in reports(n2=odd) if report.node != "n3"]
    assert list(judge(pair, NODES[:2], 2, "looked").sick) == ["n2"]


def test_who_does_not_communicate_is_sick_where_others_do() -> None:
    cut_off = reports("connected", n3={"stage": "looked"})
    assert judge(cut_off, NODES, 2, "reduced").sick == {"n3": "does not reach n1"}
    assert list(judge(reports(n2={"stage": "connected"}), NODES, 2, "reduced").sick) == ["n2"]
    nobody = judge(reports("connected"), NODES, 2, "reduced")
    assert not nobody.is_ready
    assert not nobody.sick
    assert "did not end" in nobody.note


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB, of which a share is free."""

    def set_free(free_share: float) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_share * 80e9), int(80e9)))

    return set_free


def world_of(local_rank: int, device: str = "cuda") -> World:
    return World(local_rank, local_rank, 8, 8, torch.device(device, local_rank if device == "cuda" else 0))


def test_a_gpu_that_is_missing_or_in_use(monkeypatch, gpu) -> None:
    gpu(0.5)
    assert "37.3 of 74.5 GiB" in nodes.gpu_problems(world_of(3))["GPU 3"]
    assert "8 visible, fewer than tasks" in nodes.gpu_problems(world_of(8))["GPUs"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert nodes.gpu_problems(world_of(0, "cpu")) == {}
    monkeypatch.delenv("DS_ACCELERATOR")
    assert "no GPU is visible" in nodes.gpu_problems(world_of(0, "cpu"))["GPUs"]


def start_tasks(folder: Path, flags: list[str], num: int = 2, nodes_given: str = "n1,n2") -> list:
    """Starts tasks, each as on a node of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    folder.mkdir()
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "dehvf_ds.doctor.nodes", "--into", str(folder)]
    command += ["--nodes", nodes_given, "--tasks-per-node", "1", "--", *flags]
    return [
        subprocess.Popen(
            command,
            env=os.environ
            | common
            | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_PORT": port}
            # What asks for the CPU on nodes that are expected to have GPUs.
            | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]


def test_two_tasks_look_and_communicate(world, tmp_path: Path) -> None:
    flags = ["--config", str(world / "recipe.yaml"), "--run_dir", str(tmp_path / "run")]
    tasks = start_tasks(tmp_path / "ready", [*flags, "--deepspeed", str(world / "ds.json")])
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 nodes ready" in outputs[0]
    assert [report.stage for report in nodes.read_reports(tmp_path / "ready")] == ["reduced", "reduced"]
    tasks = start_tasks(tmp_path / "wrong", [*flags, "--data.train", "/nowhere"])
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], outputs
    assert "error: /nowhere: no such directory" in outputs[0]
    assert "error: " not in outputs[1]


def test_a_signal_while_it_waits_asks_for_a_requeue(world, tmp_path: Path) -> None:
    (task,) = start_tasks(tmp_path / "asked", ["--config", str(world / "recipe.yaml")], num=1)
    end = time.monotonic() + 120
    while not any(report.stage == "looked" for report in nodes.read_reports(tmp_path / "asked")):
        assert time.monotonic() < end
        time.sleep(0.1)
    task.send_signal(signal.SIGUSR1)
    assert task.communicate(timeout=60) is not None
    assert task.returncode == 85


def test_a_task_that_is_cut_off_is_named_by_the_deadline(world, tmp_path: Path, monkeypatch, capfd) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    other = Report(node="n2", rank=1, stage="looked")
    monkeypatch.setattr(nodes, "look", lambda flags, world: ({}, {}))
    monkeypatch.setattr(nodes, "REDUCE_S", 4.0)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    (folder / "n2.1.json").write_text(json.dumps(asdict(other)))
    child = os.fork()
    if child == 0:
        os._exit(nodes.Examination(folder, ["n1", "n2"], 1).run([]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == nodes.SICK_EXIT_CODE
    assert (folder / nodes.SICK_FILE).read_text() == "n2\n"
    assert "error: node n2 is sick: does not reach n1" in capfd.readouterr().err
