"""A job's life: decisions by themselves, and whole jobs on fakes of SLURM's commands."""

from __future__ import annotations

import ast
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.fake_slurm import FakeJob
from processes import REPOSITORY
from slurm.cluster import wait_for

from dehvf_ds.cluster import node_check, supervise
from dehvf_ds.cluster.supervise import Action, after_check, after_ranks, take_over, watch_ranks
from dehvf_ds.distributed import REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE
from dehvf_ds.training.checkpoint import SavingError

REQUEUED = ["scontrol requeue 7", "scontrol update JobId=7 NumTasks=1"]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[FakeJob]:
    fake = FakeJob(tmp_path)
    yield fake
    fake.stop()


def test_exit_codes_are_those_of_the_programs() -> None:
    found = (supervise.MISTAKE, supervise.SICK, supervise.CANNOT_SAVE, supervise.STOPPED)
    programs = (USER_ERROR_EXIT_CODE, node_check.SICK_EXIT_CODE, SavingError.code, REQUEUE_EXIT_CODE)
    assert found == programs


def test_it_runs_by_an_old_python_without_packages() -> None:
    tree = ast.parse(Path(supervise.__file__).read_text(), feature_version=(3, 9))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_ranks_are_given_up_some_time_after_the_first_failure() -> None:
    for failed, since_failure_s, running_s, expected in (
        ("1 7\n", 5, 9, ("wait", 0)),
        ("1 7\n0 1\n", 6, 9, ("give up", 7)),  # the first is the cause
        ("1 ", 6, 9, ("wait", 0)),  # half a line does not count
        ("", 0, 11, ("give up", 124)),
    ):
        action = watch_ranks(failed, since_failure_s, running_s, linger_s=5, limit_s=10)
        assert (action.do, action.code) == expected


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("failed_before", [True, False])
@pytest.mark.parametrize("code", [0, 1, 2, 74, 85, 124, 137, 138, 143])
def test_a_job_goes_on_unless_it_is_done_wrong_cancelled_or_stuck(code, failed_before, is_ours) -> None:
    action = after_ranks(code, is_ours, "17", failed_before)
    stopped = code in (85, 138, 143)
    goes_on = is_ours and code not in (0, 2, 74) and (stopped or not failed_before)
    assert (action.do, action.code) == ("requeue" if goes_on else "end", code)
    if is_ours and failed_before and code in (1, 124, 137):
        assert action.message == f"error: failed twice at step 17 (exit code {code}); not requeued"


BOTH = {"n1": 2, "n2": 2}


@pytest.mark.parametrize(
    ("code", "reports", "sick", "do", "ended", "left_out"),
    [
        (0, BOTH, None, "go on", 0, ()),
        (2, BOTH, None, "end", 2, ()),
        (85, BOTH, None, "requeue", 85, ()),
        (3, BOTH, ["n2"], "requeue", 3, ("n2",)),
        (3, BOTH, [], "end", 3, ()),  # another start would be no better
        (3, {"n1": 2, "n2": 1}, None, "requeue", 3, ("n2",)),  # the first task could not judge
        (124, BOTH, None, "requeue", 3, ("n1",)),
        (127, {"n1": 0, "n2": 0}, None, "end", 2, ()),  # no such program
    ],
)
def test_what_the_check_of_the_nodes_leads_to(code, reports, sick, do, ended, left_out) -> None:
    action = after_check(code, True, reports, 2, sick, exclude=True)
    assert (action.do, action.code, action.sick) == (do, ended, left_out)
    if code:
        assert after_check(code, False, reports, 2, sick, exclude=True).do == "end"
    if action.sick:
        assert after_check(code, True, reports, 2, sick, exclude=False).do == "end"


def test_the_second_node_acts_only_where_the_first_is_dead() -> None:
    assert take_over(59, 60, False, None) == Action("wait")
    assert take_over(60, 60, False, None) == Action("ask")
    assert take_over(60, 60, False, True) == Action("wait")
    assert take_over(60, 60, False, False) == Action("requeue")
    assert take_over(1, 60, True, None) == Action("requeue")  # SLURM has noticed first


def test_a_failure_goes_back_into_the_queue_once_at_each_step(job: FakeJob) -> None:
    job.run_dir.mkdir()
    (job.run_dir / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5, "train/loss": 1.0}\n')
    rank = 'echo "says $SLURM_PROCID"; echo "cries $SLURM_PROCID" >&2; exit 1'
    assert job.run(RANK=rank) == 1
    assert job.calls("scontrol") == REQUEUED
    assert "failed at step 5 with exit code 1; the job goes on from its last checkpoint" in job.log
    # The job's log has rank 0 and all errors, a rank's own all of it.
    assert ("says 0" in job.log, "says 1" in job.log, "cries 1" in job.log) == (True, False, True)
    own = (job.logs / "rank-1.log").read_text()
    assert all(text in own for text in ("on n2, restart 0", "says 1", "cries 1"))
    assert job.run(RANK="exit 7", SLURM_RESTART_COUNT="1") == 7
    assert job.calls("scontrol") == REQUEUED
    assert "error: failed twice at step 5 (exit code 7); not requeued" in job.log


def test_ranks_that_are_left_write_their_stacks_and_are_given_up(job: FakeJob) -> None:
    hangs = """import faulthandler, os, pathlib, signal, time
faulthandler.register(signal.SIGUSR2, file=open(os.environ["DEHVF_STACKS"], "a"))
pathlib.Path(os.environ["FAKE"], "up").touch()
time.sleep(60)"""
    rank = 'if [ $SLURM_PROCID = 0 ]; then exec python3 -c "$HANGS"; fi; '
    rank += "while [ ! -e $FAKE/up ]; do sleep 0.1; done; exit 9"
    assert job.run(RANK=rank, HANGS=hangs, MAX_REQUEUES="0") == 9
    assert "error: ranks that failed (rank, exit code): 1 9; giving the others up" in job.log
    assert "most recent call first" in (job.logs / "rank-0.log").read_text()
    # The run has no directory yet.
    assert (job.run_dir / "failures.txt").read_text() == "job 7 restart 0 code 9 step start\n"
    assert "error: requeued 0 times already (MAX_REQUEUES)" in job.log
    assert not job.calls("scontrol")


def test_a_signal_to_the_rank_alone_reaches_its_command(job: FakeJob) -> None:
    waits = "trap 'exit 85' USR1; touch $FAKE/up.$SLURM_PROCID; while :; do sleep 0.1; done"
    process = job.start("bash", "slurm/eval.sh", RANK=waits)
    for rank in "01":
        wait_for((job.root / f"up.{rank}").exists, 30, "rank")
        # A rank that has not begun to listen would die of the second kind.
        for number in (signal.SIGUSR2, signal.SIGUSR1):
            os.kill(int((job.root / f"pid.{rank}").read_text()), number)
    assert process.wait(timeout=30) == 85
    assert "stopped on request; the job goes on later" in job.log
    assert job.calls("scontrol") == REQUEUED


def test_a_job_that_slurm_puts_back_itself_is_told_its_size(job: FakeJob) -> None:
    process = job.start("bash", "slurm/train_coco.sh", RANK="touch $FAKE/up; sleep 60")
    wait_for((job.root / "up").exists, 30, "rank")
    (job.root / "restarts").write_text("1")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: job.calls("scontrol"), 30, "settings")
    assert job.calls("scontrol") == REQUEUED[1:]
    assert process.poll() is None


def test_a_site_that_lets_no_job_go_back(job: FakeJob) -> None:
    (job.root / "refusal").write_text("Requests are disabled")
    assert job.run(RANK="exit 85") == 85
    assert "error: not requeued: Requests are disabled" in job.log


def test_a_sick_node_is_left_out_of_the_next_start(job: FakeJob) -> None:
    check = 'echo {} >"$4/n$((SLURM_PROCID + 1)).$SLURM_PROCID.json"; echo n2 >"$4/sick"; exit 3'
    assert job.run(CHECK=check, HEALTH_CHECK="1") == 3
    assert not job.calls("scontrol")
    assert job.run(CHECK=check, HEALTH_CHECK="1", EXCLUDE_SICK="1") == 3
    assert job.calls("scontrol")[-1] == "scontrol update JobId=7 NumTasks=1 ExcNodeList=n2"
    assert not job.calls("python", "train.py")


def test_what_runs_and_where(job: FakeJob) -> None:
    container = {"DEHVF_CONTAINER": "image", "DEHVF_MOUNTS": "/data:/data", "DEHVF_STAGE": "/local"}
    # A container hides no Python of the node's.
    assert job.run("--train.lr", "1", HEALTH_CHECK="1", CHECK="exit 0", RECIPE="demo", **container) == 0
    check, train = job.calls("apptainer")[0], job.calls("apptainer")[-1]
    mounts = f"{REPOSITORY}:{REPOSITORY},{job.logs}:{job.logs},/data:/data"
    inside = f"apptainer exec --nv --bind {mounts} --pwd {REPOSITORY} image python "
    flags = f"--train.timeout_minutes 4 --run_dir {job.run_dir} --data.cache_dir /local "
    flags += "--deepspeed ds_configs/zero2.json --config demo --train.lr 1"
    assert train == f"{inside}dehvf_ds/train.py {flags}"
    asked = f"--into {job.logs}/nodes.0 --nodes n1,n2 --tasks-per-node 1"
    assert check == f"{inside}-m dehvf_ds.cluster.node_check {asked} -- {flags}"

    (job.root / "srun_help").write_text("--container-image=...")
    assert job.run(script="slurm/train_scienceqa.sh", **container) == 0
    options = f"--container-image=image --container-mounts={mounts} --container-workdir={REPOSITORY}"
    (started,) = job.calls("srun", "--container-image=image")
    assert f"--kill-on-bad-exit=0 --cpus-per-task=1 --ntasks=2 {options} python " in started


def test_the_login_node_looks_before(job: FakeJob) -> None:
    assert job.run("--check", "--train.lr", "1", RANK="exit 2", SLURM_JOB_ID="") == 2
    flags = "--deepspeed ds_configs/zero2.json --config coco_llama13b --train.lr 1 --dry-run"
    assert job.calls("python") == [f"python dehvf_ds/train.py {flags}"]
    assert not job.calls("srun")


def test_arrays_and_other_folders_are_refused(job: FakeJob, tmp_path: Path) -> None:
    assert job.run(SLURM_ARRAY_JOB_ID="7") == 2
    assert "error: these scripts requeue whole jobs, so no job arrays" in job.log
    assert job.run(SLURM_SUBMIT_DIR=str(tmp_path)) == 2
    assert "submit from the repository's root" in job.log


def test_the_second_node_goes_on_without_the_first(job: FakeJob) -> None:
    job.logs.mkdir()
    (job.logs / "heartbeat").touch()
    command = [sys.executable, "dehvf_ds/cluster/supervise.py", "rank", "bash", "-c", "exit 1"]
    env = {"SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SUCCESSION_S": "2"}
    # A crash is all that is heard of the first node's death.
    assert job.start(*command, **env).wait(timeout=30) == 1
    assert (job.logs / "failed.0").read_text() == "1 1\n"
    assert "error: n1, where the job's script ran, does not answer; the job goes on" in job.log
    assert job.calls("scontrol") == REQUEUED
