"""The job scripts on a real SLURM of two nodes: ranks, requeues, dead nodes, neighbours, mistakes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import REPOSITORY
from slurm.cluster import Cluster, missing, running, wait_for
from tiny_entries import arguments, overflowing_tower, read_metrics, start, steps

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"a SLURM of its own needs {', '.join(missing())}"),
]

LONG = ("--train.steps", "40", "--train.save_every", "15")


@dataclass
class Site:
    """Where jobs run, and what they are given."""

    cluster: Cluster
    world: Path
    root: Path

    def submit(self, run: str, *command: str, options: tuple[str, ...] = (), **env: str) -> str:
        """Submits a run; of the training script where ``command`` does not begin with another."""
        given = {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # Both nodes are this machine, and their names are known to SLURM alone.
            "MASTER_ADDR": "127.0.0.1",
            "DEHVF_VENV": sys.prefix,
            "RECIPE": str(self.world / "recipe.yaml"),
            "DS_CONFIG": str(self.world / "ds.json"),
            "RUN_DIR": str(self.world / "runs" / run),
            "LOG_DIR": str(self.root / run),
            "LINGER_S": "5",
            "HEALTH_CHECK": "0",
        }
        if not command or (not command[0].endswith(".sh") and command[0] != "--wrap"):
            command = ("slurm/train_coco.sh", *command)
        output = f"--output={self.root / run}.log"
        return self.cluster.submit(*options, output, *command, cwd=REPOSITORY, **(given | env))

    def log(self, run: str) -> str:
        return (self.root / f"{run}.log").read_text()

    def num_steps(self, run: str) -> int:
        try:
            return steps(self.world, run)[-1]["step"]
        except (FileNotFoundError, IndexError, ValueError):
            return 0

    def reach(self, run: str, step: int) -> None:
        wait_for(lambda: self.num_steps(run) > step, 90, f"step {step} of {run}")

    def end(self, run: str, job: str, state: str, code: str = "0:0", restarts: str = "0") -> dict[str, str]:
        """Waits for a job's end, which has to be this one."""
        ended = self.cluster.wait(job, 240)
        found = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
        assert found == (state, code, restarts), self.log(run)
        return ended

    def assert_as(self, expected: str, run: str) -> None:
        """Steps and samples are another run's, and losses too, to the rounding of another number of ranks."""
        for found, other in zip(steps(self.world, run), steps(self.world, expected), strict=True):
            assert [found[key] for key in ("step", "rows_crc")] == [
                other[key] for key in ("step", "rows_crc")
            ]
            assert found["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)


@pytest.fixture(scope="module")
def site(tmp_path_factory, world) -> Iterator[Site]:
    """Besides, a run of one process that nothing disturbed."""
    root = tmp_path_factory.mktemp("slurm")
    with running(root / "cluster") as cluster:
        found = start("dehvf_ds/train.py", arguments(world, "undisturbed", *LONG))
        assert found.returncode == 0, found.stderr
        yield Site(cluster, world, root)


def test_two_nodes_side_by_side_with_another_job_equal_one_process(site: Site) -> None:
    jobs = {run: site.submit(run, *LONG, HEALTH_CHECK=check) for run, check in (("one", "1"), ("two", "0"))}
    for run, job in jobs.items():
        assert site.end(run, job, "COMPLETED")["NodeList"] == "n[1-2]"
        site.assert_as("undisturbed", run)
        ranks = {path.name: path.read_text() for path in (site.root / run).glob("rank-*.log")}
        assert sorted(ranks) == ["rank-0.log", "rank-1.log"]
        assert "on n1" in ranks["rank-0.log"]
        assert "on n2" in ranks["rank-1.log"]
        assert "on 2 x cpu" in site.log(run)
    assert "2 nodes ready; first all-reduce after" in site.log("one")


def test_a_preempted_job_saves_and_goes_on_after_the_other(site: Site) -> None:
    job = site.submit("preempted", *LONG)
    site.reach("preempted", 17)
    options = ("--nodes=2", "--partition=urgent", "--exclusive")
    urgent = site.submit("urgent", "--wrap", "sleep 2", options=options)
    site.end("urgent", urgent, "COMPLETED")
    site.end("preempted", job, "COMPLETED", restarts="1")
    assert "stopped on request after step" in site.log("preempted")
    site.assert_as("undisturbed", "preempted")


def test_a_time_limit_requeues_and_goes_on(site: Site) -> None:
    more = ("--train.steps", "4000", "--train.save_every", "1000")
    job = site.submit("limit", *more, options=("--time=1", "--signal=USR1@25"))
    wait_for(lambda: site.cluster.show(job)["Restarts"] == "1", 120, "requeue at the time limit")
    # SLURM's signal may come a minute early, and find ranks that only begin.
    assert "stopped on request" in site.log("limit")
    stopped = site.num_steps("limit")
    site.reach("limit", stopped)
    site.cluster.call("scancel", job)
    assert [line["step"] for line in steps(site.world, "limit")][:stopped] == list(range(1, stopped + 1))
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
def test_a_node_that_dies_ends_the_job_which_goes_on_with_the_other(site: Site, dead, left, lose) -> None:
    run = f"without-{dead}"
    # SLURM 22.05 begins such a job on both nodes where a node has more than one task.
    options = ("--nodes=1-2", "--ntasks-per-node=2")
    job = site.submit(run, *LONG, options=options, SUCCESSION_S="8")
    site.reach(run, 17)
    assert site.cluster.show(job)["NumNodes"] == "2"
    lose(site.cluster, dead)
    try:
        wait_for(lambda: site.cluster.show(job)["Restarts"] == "1", 60, "job back in the queue")
        assert site.end(run, job, "COMPLETED", restarts="1")["NodeList"] == left
        assert "on 4 x cpu" in site.log(run)
        assert "on 2 x cpu" in site.log(run)
        site.assert_as("undisturbed", run)
    finally:
        site.cluster.start_node(dead)
        wait_for(site.cluster.is_idle, 90, "the node's return")


def test_a_sick_node_is_named_and_left_out(site: Site, tmp_path: Path) -> None:
    old = tmp_path / "webdataset-0.0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n")
    site.cluster.set_on_node("n2", PYTHONPATH=str(tmp_path))
    settings = {"HEALTH_CHECK": "1", "EXCLUDE_SICK": "1"}
    options = ("--nodes=1-2", "--ntasks-per-node=2")
    try:
        job = site.submit("sick", "--train.steps", "4", options=options, **settings)
        ended = site.end("sick", job, "COMPLETED", restarts="1")
        assert "error: node n2 is sick: webdataset: 0.0.1; needs" in site.log("sick")
        assert (ended["NodeList"], ended["ExcNodeList"]) == ("n1", "n2")
        assert site.num_steps("sick") == 4
    finally:
        site.cluster.set_on_node("n2")


TORCHRUN = """srun --ntasks-per-node=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=1 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-endpoint="127.0.0.1:$((20000 + SLURM_JOB_ID % 10000))" dehvf_ds/train.py"""
DEEPSPEED = """scontrol show hostnames | sed 's/$/ slots=1/' > "$LOG_DIR.hosts"
deepspeed --hostfile "$LOG_DIR.hosts" --launcher slurm --no_ssh_check --master_addr 127.0.0.1 \
  dehvf_ds/train.py"""


def test_the_other_launchers(site: Site) -> None:
    jobs = {}
    for run, command in (("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)):
        flags = arguments(site.world, run, "--train.steps", "4")
        script = f"set -e; . {sys.prefix}/bin/activate; {command} {' '.join(flags)}"
        jobs[run] = site.submit(run, "--wrap", script, options=("--nodes=2",))
    for run, job in jobs.items():
        site.end(run, job, "COMPLETED")
        assert "on 2 x cpu" in site.log(run)
    site.assert_as("deepspeed", "torchrun")


def test_a_rank_that_hangs_is_given_up_with_its_stacks(site: Site) -> None:
    """In one job nothing reads data for the second rank any more; in the other that rank is frozen."""
    settings = {"TIMEOUT_MINUTES": "0.2", "MAX_REQUEUES": "0"}
    jobs = {run: site.submit(run, "--train.steps", "4000", **settings) for run in ("hangs", "frozen")}
    for run, job in jobs.items():
        site.reach(run, 3)
        find = site.cluster.loader_workers if run == "hangs" else site.cluster.ranks
        (pid,) = find("n2", job)
        os.kill(pid, signal.SIGSTOP)
    for run, job in jobs.items():
        site.end(run, job, "FAILED", "1:0")
        assert "error: requeued 0 times already (MAX_REQUEUES)" in site.log(run)
    assert "error: ranks that failed (rank, exit code): 0 1; giving the others up" in site.log("frozen")
    stacks = (site.root / "hangs/rank-1.log").read_text()
    assert "trainer.py" in stacks.partition("Current thread")[2]


def test_the_other_scripts(site: Site, tmp_path: Path) -> None:
    """ScienceQA, its shards on the nodes' own disks; its evaluation, interrupted."""
    data = (
        "--data.task",
        "scienceqa",
        "--data.train",
        str(site.world / "scienceqa"),
        "--data.max_tokens",
        "512",
    )
    settings = {"options": ("--nodes=2",), "DEHVF_STAGE": str(tmp_path / "local")}
    job = site.submit("sqa", "slurm/train_scienceqa.sh", *data, **settings)
    site.end("sqa", job, "COMPLETED")
    assert list((tmp_path / "local").glob("*.tar"))
    run = site.world / "runs/sqa"
    asked = ("--model", str(run), "--data", str(site.world / "scienceqa"), "--task", "scienceqa")
    job = site.submit("eval", "slurm/eval.sh", *asked, options=("--nodes=2",))
    wait_for((site.root / "eval/rank-1.log").exists, 60, "start of the evaluation")
    site.cluster.signal_ranks(signal.SIGUSR1)
    site.end("eval", job, "COMPLETED", restarts="1")
    read_metrics(run / "eval/scienceqa-scienceqa")


def test_a_mistake_ends_a_job_and_so_does_failing_twice_at_one_step(site: Site) -> None:
    more = ["--train.save_every", "1", "--train.max_bad_steps", "3", "--train.steps", "40"]
    broken = site.submit("broken", *more, "--model.vision_tower", str(overflowing_tower(site.world)))
    wrong = site.submit("wrong", "--data.train", "/nowhere", HEALTH_CHECK="1")
    site.end("wrong", wrong, "FAILED", "2:0")
    assert site.log("wrong").count("error: /nowhere") == 1, site.log("wrong")
    site.end("broken", broken, "FAILED", "1:0", restarts="1")
    assert "goes on from its last checkpoint" in site.log("broken")
    assert "error: failed twice at step" in site.log("broken")
