from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import USER_ENVIRONMENT, start_ranks

from dehvf_ds.config import UserError
from dehvf_ds.distributed import first_host, has_fast_bf16, read_world


def test_alone_is_one_process() -> None:
    env: dict[str, str] = {}
    world = read_world(env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.is_main


def test_launchers_environment_is_taken() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = read_world(env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert not world.is_main


def test_srun_is_mapped_for_deepspeed_too() -> None:
    env = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "41234",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
    }
    world = read_world(env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert env["MASTER_ADDR"] == "gpu003"
    assert env["MASTER_PORT"] == str(10000 + 1234)
    assert env["RANK"] == "3"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-004,7],cpu1", "gpu003"),
        ("a-b[9,11]", "a-b9"),
        ("h[1-2,5]", "h1"),
    ],
)
def test_the_first_node_of_slurms_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_inside_a_batch_script_without_srun_it_is_one_process() -> None:
    world = read_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"})
    assert world.size == 1


def test_a_variable_that_is_no_number_is_an_error() -> None:
    with pytest.raises(UserError, match="not a number"):
        read_world({"RANK": "zero", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


MEETS = """
from dehvf_ds.distributed import init_process_group, read_world, run_entry
run_entry(lambda _: init_process_group(read_world()))
"""


def test_a_port_that_another_run_holds_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        result = subprocess.run(
            [sys.executable, "-c", MEETS],
            env=USER_ENVIRONMENT | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert result.returncode == 2
    assert f"error: port {port}, where the ranks meet, is in use" in result.stderr
    assert "--master_port" in result.stderr


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


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "0"},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
    ],
)
def test_a_place_that_is_none_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(UserError, match="no such place; start by deepspeed, torchrun or srun"):
        read_world(dict(env))


def test_bf16_is_asked_of_the_device_that_is_used(monkeypatch) -> None:
    def asked(**_: bool) -> bool:
        raise AssertionError("the GPU computes nothing here")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", asked)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert has_fast_bf16() in (True, False)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(AssertionError):
        has_fast_bf16()
