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


def test_a_killed_job_leaves_no_lock_behind(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / HOLDER_FILE).exists()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("alive", [False, True])
def test_another_hosts_lock_is_waited_for(tmp_path, monkeypatch, alive, capsys):
    path = tmp_path / HOLDER_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "42"}))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if alive:
            path.touch()
        else:
            past = time.time() - run_lock.DEAD_AFTER_S - 1
            os.utime(path, (past, past))

    past = time.time() - 60
    os.utime(path, (past, past))
    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    if alive:
        with pytest.raises(UserError, match="in use by process 7 on elsewhere, job 42"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).release()
    assert len(waited) == 1
    assert "was in use by process 7 on elsewhere, job 42; waiting" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_without_locks_the_heartbeat_decides_on_one_host_too(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run_lock.FileLock, "acquire", fail)
    first = RunLock(tmp_path)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(tmp_path / HOLDER_FILE))
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    first.release()
    RunLock(tmp_path).release()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir .*file/run: "):
        RunLock(tmp_path / "file" / "run")


def test_who_was_taken_for_dead_learns_it_and_leaves_the_lock_alone(tmp_path):
    stale = RunLock(tmp_path)
    stale.beat()
    content = {"host": "elsewhere", "pid": 7, "job": "42", "token": "another"}
    (tmp_path / HOLDER_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="was taken over by process 7 on elsewhere, job 42; this job stops"):
        stale.check()
    with pytest.raises(UserError, match="taken over"):
        stale.beat()
    stale.release()
    assert json.loads((tmp_path / HOLDER_FILE).read_text()) == content


def test_a_lock_that_was_removed_is_lost(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / HOLDER_FILE).unlink()
    with pytest.raises(UserError, match="taken away"):
        lock.check()
    lock.release()


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


def test_a_lock_given_back_while_it_is_waited_for_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / HOLDER_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: path.unlink())
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()
