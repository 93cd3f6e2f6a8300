from __future__ import annotations

import errno
import json
import os
import time

import pytest

from dehvf_ds.config import UserError
from dehvf_ds.training import run_lock
from dehvf_ds.training.run_lock import HOLDER_FILE, RunLock


def test_a_second_job_is_refused_until_the_first_ends(tmp_path):
    first = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path / "run")
    first.release()
    assert not (tmp_path / "run" / HOLDER_FILE).exists()
    RunLock(tmp_path / "run").release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir .*file/run: "):
        RunLock(tmp_path / "file" / "run")


def test_a_killed_job_leaves_no_lock_behind(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / HOLDER_FILE).exists()
    RunLock(tmp_path).release()


def age(path) -> None:
    past = time.time() - run_lock.DEAD_AFTER_S - 1
    os.utime(path, (past, past))


@pytest.mark.parametrize("meanwhile", ["touch", "age", "unlink"])
def test_another_hosts_lock_is_waited_for(tmp_path, monkeypatch, meanwhile, capsys):
    path = tmp_path / HOLDER_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "42"}))
    os.utime(path, (time.time() - 60, time.time() - 60))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        age(path) if meanwhile == "age" else getattr(path, meanwhile)()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    if meanwhile == "touch":
        with pytest.raises(UserError, match="in use by process 7 on elsewhere, job 42"):
            RunLock(tmp_path)
    else:
        lock = RunLock(tmp_path)
        lock.check()
        lock.release()
    assert len(waited) == 1
    assert "was in use by process 7 on elsewhere, job 42; waiting" in capsys.readouterr().out


def test_without_locks_the_heartbeat_decides_on_one_host_too(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.FileLock, "acquire", fail)
    first = RunLock(tmp_path)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(tmp_path / HOLDER_FILE))
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


OTHER = json.dumps({"host": "elsewhere", "pid": 7, "job": "42", "token": "another"})


@pytest.mark.parametrize(
    ("holder", "message"),
    [(OTHER, "taken over by process 7 on elsewhere, job 42; this job stops"), (None, "taken away")],
)
def test_who_was_taken_for_dead_learns_it_and_leaves_the_lock_alone(tmp_path, holder, message):
    stale = RunLock(tmp_path)
    stale.beat()
    (tmp_path / HOLDER_FILE).unlink()
    if holder is not None:
        (tmp_path / HOLDER_FILE).write_text(holder)
    for look in (stale.check, stale.beat):
        with pytest.raises(UserError, match=message):
            look()
    stale.release()
    assert holder is None or (tmp_path / HOLDER_FILE).read_text() == holder


def test_a_job_that_is_started_again_takes_over_from_its_last_start(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HANDOVER_S", 0.5)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    before = RunLock(tmp_path)
    # Another step of the same start is another job.
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    after = RunLock(tmp_path)
    after.beat()
    with pytest.raises(UserError, match="taken over"):
        before.beat()
    before.release()
    after.check()
    after.release()
