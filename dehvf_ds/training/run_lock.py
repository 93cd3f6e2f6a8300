"""A run directory belongs to one live job: two would mix metrics and remove each other's checkpoints."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dehvf_ds.config import UserError

LOCK_FILE = ".lock"
HOLDER_FILE = "lock.json"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""

STALE_S = 120.0
"""A job on another host without a heartbeat for so long is dead."""

BEAT_EVERY_S = 20.0
HANDOVER_S = 30.0
"""How long a restarted SLURM job waits for what is left of its last start."""


class RunLock:
    """Holds a run directory as long as this process lives and no other job takes it over.

    A file lock decides on one host, and on file systems that have locks across hosts; where there are none,
    the time of the last heartbeat does. A killed process loses the lock at once. A job that was only taken
    for dead (its node was cut off, its process stopped) finds another token in the holder's file, and must
    write nothing more.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock once another host's job has gone stale; UserError if a live job has it."""
        self._run_dir, self._holder = run_dir, run_dir / HOLDER_FILE
        self._token = uuid.uuid4().hex
        self._last_beat = time.monotonic()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Threads share it: one of them may release what another took.
            self._lock = FileLock(run_dir / LOCK_FILE, thread_local=False, fallback_to_soft=False)
            self._acquire(_read(self._holder))
            self._holder.write_text(json.dumps(self._describe()) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"run_dir {run_dir}: {getattr(error, 'strerror', None) or error}") from None

    def check(self) -> None:
        """Makes sure, before each write, that the directory is still this job's; UserError if not."""
        try:
            found = json.loads(self._holder.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        except OSError:
            return  # The file system has other troubles; they end the run elsewhere, or pass.
        if found.get("token") != self._token:
            by = f"taken over by {_name(found)}" if found else f"taken away ({HOLDER_FILE} is gone)"
            raise UserError(f"run_dir {self._run_dir} was {by}; this job stops, and writes nothing more")

    def beat(self) -> None:
        """Shows that the job lives; to be called at every step. Raises as ``check``."""
        self.check()
        if time.monotonic() - self._last_beat > BEAT_EVERY_S:
            self._last_beat = time.monotonic()
            try:
                os.utime(self._holder)
            except OSError:
                return  # A full disk must not end the run here.

    def release(self) -> None:
        """Gives the directory back; one that another job has taken is left alone."""
        if _read(self._holder).get("token") == self._token:
            self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _acquire(self, before: dict[str, Any]) -> None:
        restarted = _is_earlier_start(before)
        elsewhere = bool(before) and before.get("host") != socket.gethostname()
        if elsewhere and not restarted:
            self._wait_for_silence(before)
        try:
            self._lock.acquire(timeout=HANDOVER_S if restarted else 0)
        except Timeout:
            # What is left of a dead job may still hold it, and will find another token.
            if not restarted and not elsewhere:
                raise self._in_use(before) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            # The file system has no locks, so that the heartbeat decides on one host, too.
            if before and not restarted and not elsewhere:
                self._wait_for_silence(before)

    def _wait_for_silence(self, before: dict[str, Any]) -> None:
        """Waits until the last holder's heartbeat is old; refuses where it beats, or another has come."""
        seen = self._last_sign()
        if seen is None or time.time() - seen >= STALE_S:
            return
        told = f"run_dir {self._run_dir} was in use by {_name(before)}; waiting for it to end"
        print(told, flush=True)
        while (left := seen + STALE_S - time.time()) > 0:
            time.sleep(min(left + 1, BEAT_EVERY_S))
            now = self._last_sign()
            if now is None:
                return
            if now > seen:
                raise self._in_use(_read(self._holder))
            seen = now

    def _last_sign(self) -> float | None:
        """When the holder's file was last written or touched; None where there is none."""
        try:
            return self._holder.stat().st_mtime
        except FileNotFoundError:
            return None

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        return UserError(f"run_dir {self._run_dir} is in use by {_name(holder)}; name another")

    def _describe(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": self._token,
        }


def _is_earlier_start(before: dict[str, Any]) -> bool:
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return job is not None and before.get("job") == job and before.get("restart") != restart


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}"
