"""A run directory belongs to one live job: two would mix metrics and remove each other's checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError

LEASE_FILE = "lease.json"
STALE_S = 120.0
"""A lease of another host that was not renewed for so long is of a job that died."""

RENEW_EVERY_S = 20.0
HANDOVER_S = 30.0
"""How long a SLURM job that was started again waits for what is left of its last start."""


class Lease:
    """Holds a run directory as long as this process lives and no other takes it over.

    A lock on the file tells on one host, and wherever the file system has locks across hosts; where it has
    none, the time of the last renewal does. Killed processes lose the lock at once. A job that was taken
    for dead and is not (its node was cut off, its process was stopped) finds another's token in the file
    and must write nothing more.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lease; waits for a stale one of another host to run out.

        Raises:
            UserError: another live job has it, or the directory cannot be written.
        """
        self._run_dir, self._path = run_dir, run_dir / LEASE_FILE
        self._token = uuid.uuid4().hex
        self._renewed = 0.0
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            before = _read(self._path)
            self._file = self._path.open("a+", encoding="utf-8")
            self._take_over(before)
            # Who had it may have removed the file meanwhile: what is open then has no name.
            while not self._is_named():
                self._file.close()
                self._file = self._path.open("a+", encoding="utf-8")
                if not self._lock():
                    raise self._in_use(_read(self._path))
            self._write()
        except OSError as error:
            raise UserError(f"run_dir {run_dir}: {error.strerror or error}") from None

    def check(self) -> None:
        """Looks whether the directory is still this job's; to be called before anything is written.

        Raises:
            UserError: another job has taken it over, or its lease was removed.
        """
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        except OSError:
            return  # The file system has other troubles; they end the run elsewhere, or pass.
        if found.get("token") != self._token:
            by = f"taken over by {_holder(found)}" if found else f"taken away ({LEASE_FILE} is gone)"
            raise UserError(f"run_dir {self._run_dir} was {by}; this job stops, and writes nothing more")

    def renew(self) -> None:
        """Says that the job lives; to be called at every step. Raises as ``check``."""
        self.check()
        if time.monotonic() - self._renewed > RENEW_EVERY_S:
            self._renewed = time.monotonic()
            # A full disk must not end the run here.
            try:
                os.utime(self._path)
            except OSError:
                return

    def release(self) -> None:
        """Gives the directory back; one that another has taken is left alone."""
        if _read(self._path).get("token") == self._token:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _take_over(self, before: dict[str, Any]) -> None:
        is_free = self._lock()
        elsewhere = bool(before) and before.get("host") != socket.gethostname()
        if _is_earlier_start(before):
            # SLURM started this job again: what is left of its last start ends soon, or will find the token.
            end = time.monotonic() + HANDOVER_S
            while not is_free and self._path.exists() and time.monotonic() < end:
                time.sleep(1)
                is_free = self._lock()
        elif elsewhere:
            self._wait_for_other_host(before)
        elif not is_free:
            raise self._in_use(before)

    def _lock(self) -> bool:
        """Whether nobody else has the lock; without locks on this file system, yes."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            # No locks here: the times must do.
            return True
        return True

    def _wait_for_other_host(self, before: dict[str, Any]) -> None:
        told = False
        while (age := time.time() - self._path.stat().st_mtime) < STALE_S:
            if not told:
                found = f"run_dir {self._run_dir} was in use by {_holder(before)}"
                print(f"{found}; waiting for it to end", flush=True)
                told = True
            seen = self._path.stat().st_mtime
            time.sleep(min(STALE_S - age + 1, RENEW_EVERY_S))
            if not self._path.exists():
                return
            if self._path.stat().st_mtime > seen:
                raise self._in_use(before)

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        self._file.close()
        return UserError(f"run_dir {self._run_dir} is in use by {_holder(holder)}; name another")

    def _is_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _write(self) -> None:
        self._renewed = time.monotonic()
        self._file.truncate(0)
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": self._token,
        }
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _is_earlier_start(before: dict[str, Any]) -> bool:
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return job is not None and before.get("job") == job and before.get("restart") != restart


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder(content: dict[str, Any]) -> str:
    job = f", job {content['job']}" if content.get("job") else ""
    return f"process {content.get('pid', '?')} on {content.get('host', '?')}{job}"
