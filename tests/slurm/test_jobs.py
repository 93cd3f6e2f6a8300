"""The job scripts on a real SLURM of two nodes: ranks, requeues, dead nodes, neighbours, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing, running, wait_for
from tiny_entries import arguments, overflowing_tower, read_metrics, start
from training.launch import REPOSITORY

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
    try:
        wait_for(lambda: site.cluster.show(job)["Restarts"] == "1", 60, "job back in the queue")
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
    """In one job nothing reads data for the second rank any more; in the other that rank is frozen."""
    settings = {"TIMEOUT_MINUTES": "0.2", "MAX_REQUEUES": "0"}
    jobs = {run: site.submit(run, "--train.steps", "4000", **settings) for run in ("hangs", "frozen")}
    for run, job in jobs.items():
        wait_for(lambda run=run: site.num_steps(run) > 3, 90, "step 3")
        find = site.cluster.loader_workers if run == "hangs" else site.cluster.ranks
        (pid,) = find("n2", job)
        os.kill(pid, signal.SIGSTOP)
    for run, job in jobs.items():
        ended = site.cluster.wait(job, 90)
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), site.log(run)
        assert "error: requeued 0 times already (MAX_REQUEUES)" in site.log(run)
    assert "error: ranks that failed (rank, exit code): 0 1; giving the others up" in site.log("frozen")
    stacks = (site.root / "hangs-logs/rank-1.log").read_text()
    assert "trainer.py" in stacks.partition("Current thread")[2]


def test_the_other_scripts(site, tmp_path: Path) -> None:
    """ScienceQA, its shards on the nodes' own disks; its evaluation, interrupted."""
    shards = str(site.world / "scienceqa")
    data = ("--data.task", "scienceqa", "--data.train", shards, "--data.max_tokens", "512")
    script, local = "slurm/train_scienceqa.sh", tmp_path / "local"
    job = site.submit("sqa", *data, options=("--nodes=2",), script=script, DEHVF_STAGE=str(local))
    assert site.cluster.wait(job, 90)["JobState"] == "COMPLETED", site.log("sqa")
    assert list(local.glob("*.tar"))

    asked = ("--model", str(site.root / "sqa"), "--data", shards, "--task", "scienceqa")
    job = site.submit("eval", *asked, options=("--nodes=2",), script="slurm/eval.sh")
    wait_for((site.root / "eval-logs/rank-1.log").exists, 60, "start of the evaluation")
    for node in ("n1", "n2"):
        site.cluster.signal_shells(node, signal.SIGUSR1)
    ended = site.cluster.wait(job, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log("eval")
    read_metrics(site.root / "sqa/eval/scienceqa-scienceqa")


def test_a_mistake_ends_a_job_and_so_does_failing_twice_at_one_step(site) -> None:
    more = ["--train.save_every", "1", "--train.max_bad_steps", "3", "--train.steps", "40"]
    broken = site.submit("broken", *more, "--model.vision_tower", str(overflowing_tower(site.world)))
    wrong = site.submit("wrong", "--data.train", "/nowhere", HEALTH_CHECK="1")
    ended = site.cluster.wait(wrong, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert site.log("wrong").count("error: /nowhere") == 1, site.log("wrong")
    ended = site.cluster.wait(broken, 120)
    said = site.log("broken")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1"), said
    assert "goes on from its last checkpoint" in said
    assert "error: failed twice at step" in said


def test_the_login_node_looks_before(site) -> None:
    environment = os.environ | site.environment("check")
    found = subprocess.run(
        ["bash", SCRIPT, "--check"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "nothing is wrong" in found.stdout
