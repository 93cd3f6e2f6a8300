"""The job scripts on a real SLURM of two nodes: ranks, requeues, dead nodes, neighbours, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import REPOSITORY
from slurm.cluster import PATIENCE, Cluster, missing, running, wait_for
from tiny_entries import arguments, overflowing_tower, read_metrics, start

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"a SLURM of its own needs {', '.join(missing())}"),
]

SCRIPT = "slurm/train_coco.sh"


@dataclass
class Site:
    """Where jobs run, and what they are given."""

    cluster: Cluster
    world: Path
    root: Path

    def environment(self, run: str) -> dict[str, str]:
        return {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # Both nodes are this machine, and their names are known to SLURM alone.
            "MASTER_ADDR": "127.0.0.1",
            "DEHVF_VENV": sys.prefix,
            "RECIPE": str(self.world / "recipe.yaml"),
            "DS_CONFIG": str(self.world / "ds.json"),
            "RUN_DIR": str(self.root / run),
            "LOG_DIR": str(self.root / f"{run}-logs"),
            "LINGER_S": "5",
            "HEALTH_CHECK": "0",
        }

    def submit(
        self, run: str, *more: str, options: tuple[str, ...] = (), script: str = SCRIPT, **env: str
    ) -> str:
        output = ("--output", str(self.root / f"{run}.log"))
        return self.cluster.submit(
            *options, *output, script, *more, cwd=REPOSITORY, **(self.environment(run) | env)
        )

    def log(self, run: str) -> str:
        path = self.root / f"{run}.log"
        return path.read_text() if path.exists() else ""

    def lines(self, run: str) -> list[dict]:
        path = self.root / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def num_steps(self, run: str) -> int:
        try:
            return self.lines(run)[-1]["step"]
        except (IndexError, ValueError):
            return 0


def assert_same_course(found: list[dict], expected: list[dict]) -> None:
    """Steps and samples are the same, and losses to the rounding of another number of ranks."""
    for key in ("step", "rows_crc"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["train/loss"] for line in found] == pytest.approx(
        [line["train/loss"] for line in expected], abs=1e-4
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory, world) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("slurm")
    with running(root / "cluster") as cluster:
        yield Site(cluster, world, root)


LONG = ("--train.steps", "40", "--train.save_every", "15")


@pytest.fixture(scope="module")
def undisturbed(site) -> list[dict]:
    """The metrics of a long run on one process that nothing disturbed."""
    found = start("dehvf_ds/train.py", arguments(site.world, "undisturbed", *LONG))
    assert found.returncode == 0, found.stderr
    path = site.world / "runs/undisturbed/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_nodes_side_by_side_with_another_job_equal_one_process(site, undisturbed) -> None:
    jobs = {run: site.submit(run, *LONG, HEALTH_CHECK=look) for run, look in (("one", "1"), ("two", "0"))}
    for run, job in jobs.items():
        ended = site.cluster.wait(job, 180)
        assert ended["JobState"] == "COMPLETED", site.log(run)
        assert ended["Restarts"] == "0"
        assert ended["NodeList"] == "n[1-2]"
        assert_same_course(site.lines(run), undisturbed)
        ranks = {path.name: path.read_text() for path in (site.root / f"{run}-logs").glob("rank-*.log")}
        assert sorted(ranks) == ["rank-0.log", "rank-1.log"]
        assert "on n1" in ranks["rank-0.log"]
        assert "on n2" in ranks["rank-1.log"]
        assert "on 2 x cpu" in site.log(run)
    assert "2 nodes ready; first all-reduce after" in site.log("one")


def test_a_signal_saves_requeues_and_goes_on(site, undisturbed) -> None:
    job = site.submit("signal", *LONG)
    wait_for(lambda: site.num_steps("signal") > 17, 90, "step 17")
    site.cluster.call("scancel", "--signal=USR1", job)
    ended = site.cluster.wait(job, 180)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log("signal")
    assert "stopped on request after step" in site.log("signal")
    assert_same_course(site.lines("signal"), undisturbed)


def test_a_preempted_job_saves_and_goes_on_after_the_other(site, undisturbed) -> None:
    job = site.submit("preempted", *LONG)
    wait_for(lambda: site.num_steps("preempted") > 17, 90, "step 17")
    options = ("--nodes=2", "--partition=urgent", "--exclusive", "--output=/dev/null")
    urgent = site.cluster.submit(*options, "--wrap", "sleep 2", cwd=site.root)
    assert site.cluster.wait(urgent, 60)["JobState"] == "COMPLETED"
    ended = site.cluster.wait(job, 180)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log("preempted")
    assert "stopped on request after step" in site.log("preempted")
    assert_same_course(site.lines("preempted"), undisturbed)


def test_a_time_limit_saves_requeues_and_goes_on(site) -> None:
    steps = ("--train.steps", "4000", "--train.save_every", "1000")
    job = site.submit("limit", *steps, options=("--time=1", "--signal=USR1@25"))
    wait_for(lambda: site.cluster.show(job)["Restarts"] == "1", 120, "requeue at the time limit")
    before = site.log("limit")
    assert "stopped on request after step" in before
    stopped = site.num_steps("limit")
    wait_for(lambda: site.num_steps("limit") > stopped, 90, "step after the requeue")
    site.cluster.call("scancel", job)
    assert [line["step"] for line in site.lines("limit")][:stopped] == list(range(1, stopped + 1))
    site.cluster.wait(job)


@pytest.mark.parametrize(
    ("dead", "left", "lose"),
    [
        ("n2", "n1", Cluster.kill_node),
        # With the job's script.
        ("n1", "n2", Cluster.kill_node),
        # The ranks wait for it in vain, and SLURM is the first to know.
        ("n2", "n1", Cluster.cut_off_node),
    ],
)
def test_a_node_that_dies_ends_the_job_which_goes_on_with_the_other(
    site, undisturbed, dead, left, lose
) -> None:
    run = f"{lose.__name__}-{dead}"
    # SLURM 22.05 begins such a job on both nodes where a node has more than one task.
    options = ("--nodes=1-2", "--ntasks-per-node=2")
    job = site.submit(run, *LONG, options=options, SUCCESSION_S="8")
    wait_for(lambda: site.num_steps(run) > 17, 90, "step 17")
    assert site.cluster.show(job)["NumNodes"] == "2"
    assert "on 4 x cpu" in site.log(run)
    lose(site.cluster, dead)
    lost = time.monotonic()
    try:
        wait_for(lambda: site.cluster.show(job)["Restarts"] == "1", 60, "job back in the queue")
        print(f"{run}: back in the queue after {time.monotonic() - lost:.0f} s")
        ended = site.cluster.wait(job, 240)
        assert ended["JobState"] == "COMPLETED", site.log(run)
        assert ended["Restarts"] == "1"
        assert ended["NodeList"] == left
        assert "on 2 x cpu" in site.log(run)
        assert_same_course(site.lines(run), undisturbed)
    finally:
        site.cluster.start_node(dead)
        wait_for(site.cluster.is_idle, 90, "the node's return")


def test_a_sick_node_is_named_and_left_out(site, tmp_path: Path) -> None:
    old = tmp_path / "webdataset-0.0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n")
    site.cluster.set_on_node("n2", PYTHONPATH=str(tmp_path))
    short = ("--train.steps", "4")
    try:
        job = site.submit("sick", *short, HEALTH_CHECK="1")
        ended = site.cluster.wait(job, 90)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")
        assert "error: node n2 is sick: webdataset: 0.0.1; needs" in site.log("sick")
        assert not site.lines("sick")
        options = ("--nodes=1-2", "--ntasks-per-node=2")
        job = site.submit("left-out", *short, options=options, HEALTH_CHECK="1", EXCLUDE_SICK="1")
        ended = site.cluster.wait(job, 120)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log("left-out")
        assert (ended["NodeList"], ended["ExcNodeList"]) == ("n1", "n2")
        assert site.num_steps("left-out") == 4
    finally:
        site.cluster.set_on_node("n2")


TORCHRUN = """srun --ntasks-per-node=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=1 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-endpoint="127.0.0.1:$((20000 + SLURM_JOB_ID % 10000))" dehvf_ds/train.py"""
DEEPSPEED = """scontrol show hostnames | sed 's/$/ slots=1/' > "$LOG_DIR.hosts"
deepspeed --hostfile "$LOG_DIR.hosts" --launcher slurm --no_ssh_check --master_addr 127.0.0.1 \
  dehvf_ds/train.py"""


def test_the_other_launchers(site) -> None:
    jobs = {}
    for run, command in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)):
        flags = arguments(site.world, run, "--run_dir", str(site.root / run), "--train.steps", "4")
        script = f"set -e; . {sys.prefix}/bin/activate; {command} {' '.join(flags)}"
        options = ("--nodes=2", "--output", str(site.root / f"{run}.log"), "--wrap", script)
        jobs[run] = site.cluster.submit(*options, cwd=REPOSITORY, **site.environment(run))
    for run, job in jobs.items():
        assert site.cluster.wait(job, 120)["JobState"] == "COMPLETED", site.log(run)
        assert "on 2 x cpu" in site.log(run)
    assert_same_course(site.lines("torchrun"), site.lines("deepspeed"))


def test_a_rank_that_hangs_is_given_up_with_its_stacks(site) -> None:
    job = site.submit("hangs", "--train.steps", "4000", TIMEOUT_MINUTES="0.2", MAX_REQUEUES="0")
    wait_for(lambda: site.num_steps("hangs") > 3, 90, "step 3")
    # Nothing reads data for the second rank any more.
    (worker,) = site.cluster.loader_workers("n2")
    os.kill(worker, signal.SIGSTOP)
    ended = site.cluster.wait(job, 90)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), site.log("hangs")
    assert "error: requeued 0 times already (MAX_REQUEUES)" in site.log("hangs")
    stacks = (site.root / "hangs-logs/rank-1.log").read_text()
    assert "Current thread" in stacks
    assert "loop.py" in stacks.partition("Current thread")[2]


def test_a_rank_that_is_frozen_is_given_up(site) -> None:
    job = site.submit("frozen", "--train.steps", "4000", TIMEOUT_MINUTES="0.2", MAX_REQUEUES="0")
    wait_for(lambda: site.num_steps("frozen") > 3, 90, "step 3")
    (rank,) = site.cluster.ranks("n2")
    os.kill(rank, signal.SIGSTOP)
    ended = site.cluster.wait(job, 90)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), site.log("frozen")
    assert "error: ranks that failed (rank, exit code): 0 1; giving the others up," in site.log("frozen")


APPTAINER = """#!/bin/bash
echo "$@" > "$(dirname "$0")/called"
while [ "$1" != picture.sif ]; do shift; done
shift
exec "$@"
"""


def test_the_other_scripts(site, tmp_path: Path) -> None:
    """ScienceQA, staged, in a container whose runtime is a stand-in; its evaluation, interrupted."""
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    shards = str(site.world / "scienceqa")
    data = ("--data.task", "scienceqa", "--data.train", shards, "--data.max_tokens", "512")
    path = f"{tmp_path}:{sys.prefix}/bin:{os.environ['PATH']}"
    script = "slurm/train_scienceqa.sh"
    container = {"PATH": path, "DEHVF_CONTAINER": "picture.sif", "DEHVF_MOUNTS": "/data:/data"}
    container["DEHVF_STAGE"] = str(tmp_path / "local")
    job = site.submit("sqa", *data, options=("--nodes=2",), script=script, **container)
    assert site.cluster.wait(job, 90)["JobState"] == "COMPLETED", site.log("sqa")
    (staged,) = (tmp_path / "local").iterdir()
    assert str(staged) in (site.root / "sqa/config.yaml").read_text()
    called = (tmp_path / "called").read_text()
    mounts = f"{REPOSITORY}:{REPOSITORY},{site.root}/sqa-logs:{site.root}/sqa-logs,/data:/data"
    assert called.startswith(f"exec --nv --bind {mounts} --pwd {REPOSITORY} picture.sif python ")

    asked = ("--model", str(site.root / "sqa"), "--data", shards, "--task", "scienceqa")
    job = site.submit("eval", *asked, options=("--nodes=2",), script="slurm/eval.sh")
    wait_for((site.root / "eval-logs/rank-1.log").exists, 60, "start of the evaluation")
    for node in ("n1", "n2"):
        site.cluster.signal_shells(node, signal.SIGUSR1)
    ended = site.cluster.wait(job, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log("eval")
    read_metrics(site.root / "sqa/eval/scienceqa-scienceqa")


def test_a_run_that_fails_twice_at_one_step_stops_and_says_so(site) -> None:
    tower = str(overflowing_tower(site.world))
    more = ["--train.save_every", "1", "--train.max_bad_steps", "3", "--model.vision_tower", tower]
    job = site.submit("broken", "--train.steps", "40", *more)
    ended = site.cluster.wait(job, 120)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1"), site.log(
        "broken"
    )
    assert "goes on from what was last saved" in site.log("broken")
    assert "error: failed twice at step" in site.log("broken")


def test_a_wrong_path_is_one_line_within_seconds(site) -> None:
    started = time.monotonic()
    job = site.submit("wrong", "--data.train", "/nowhere", HEALTH_CHECK="1")
    ended = site.cluster.wait(job, 60)
    seconds = time.monotonic() - started
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    errors = [line for line in site.log("wrong").splitlines() if "error: /nowhere" in line]
    assert len(errors) == 1, site.log("wrong")
    print(f"failed {seconds:.1f} s after it was submitted")
    # Seven to nine on an idle machine.
    assert seconds < 10 * PATIENCE


def test_the_login_node_finds_it_before(site) -> None:
    command = ["bash", SCRIPT, "--check", "--data.train", "/nowhere"]
    environment = os.environ | site.environment("check")
    found = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 2
    assert "error: /nowhere: no such directory" in found.stderr
    found = subprocess.run(
        command[:3], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "nothing is wrong" in found.stdout
