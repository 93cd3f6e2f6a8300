from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from processes import start_rank, start_ranks

from dehvf_ds.config import UserError
from dehvf_ds.distributed import World, has_fast_bf16, read_world

SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "41234",
}


def world_of(monkeypatch, env: dict[str, str]) -> World:
    """What a process with these variables of a launcher takes for its place."""
    for name in list(os.environ):
        if "RANK" in name or "WORLD_SIZE" in name or name.startswith(("SLURM_", "MASTER_")):
            monkeypatch.delenv(name)
    # So that what is added is removed again.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        del os.environ[name]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return read_world()


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        (SRUN, (3, 4, 1, 2)),
        # In a batch script without srun it is alone.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, (0, 1, 0, 1)),
    ],
)
def test_a_launchers_environment_is_understood(monkeypatch, env, place) -> None:
    world = world_of(monkeypatch, env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == place


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1,n2", "n1"), ("gpu[003-004,7],cpu1", "gpu003"), ("a-b[9,11]", "a-b9")]
)
def test_srun_is_mapped_for_deepspeed_too(monkeypatch, nodes: str, first: str) -> None:
    world_of(monkeypatch, SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert os.environ["MASTER_ADDR"] == first
    assert os.environ["MASTER_PORT"] == str(10000 + 1234)
    assert os.environ["RANK"] == "3"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "not a number"),
        *(
            (env, "no such place; start by deepspeed, torchrun or srun")
            for env in ({"RANK": "5", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"})
        ),
    ],
)
def test_a_place_that_is_none_is_refused(monkeypatch, env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        world_of(monkeypatch, env)


CONNECTS = """
from dehvf_ds.distributed import init_process_group, read_world, run_entry
run_entry(lambda _: init_process_group(read_world()))
"""


def test_a_port_that_another_run_holds_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "connects.py").write_text(CONNECTS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rank = start_rank(tmp_path / "connects.py", [], 0, 2, port)
        output, _ = rank.communicate(timeout=240)
    assert rank.returncode == 2
    assert f"error: port {port}, where the ranks meet, is in use" in output
    assert "--master_port" in output


WAITS = """
import sys, time
import torch
from dehvf_ds.distributed import init_process_group, read_world, set_timeout

world = read_world()
init_process_group(world, 5)
group = torch.distributed.new_group([0, 1])
set_timeout(0.02)
if world.is_main:
    torch.distributed.all_reduce(torch.ones(1), group=None if sys.argv[1] == "all" else group)
else:
    time.sleep(10)
"""


@pytest.mark.parametrize("group", ["all", "other"])
def test_a_timeout_that_is_set_later_holds_in_every_group(tmp_path: Path, group: str) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    ranks = start_ranks(tmp_path / "waits.py", [group], 2)
    try:
        output = ranks[0].communicate(timeout=60)[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode != 0
    assert "1200ms" in output


def test_bf16_depends_on_the_device_that_is_used(monkeypatch) -> None:
    def asked(**_: bool) -> bool:
        raise AssertionError("the GPU computes nothing here")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", asked)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert has_fast_bf16() in (True, False)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(AssertionError):
        has_fast_bf16()
