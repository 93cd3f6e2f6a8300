"""A run directory belongs to one live job: two would mix metrics and delete each other's checkpoints."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dehvf_ds.config import UserError

LOCK_FILE = ".lock"
HOLDER_FILE = "lock.json"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system without locks."""

DEAD_AFTER_S = 120.0
"""A job on another host without a heartbeat for so long is dead."""

HEARTBEAT_S = 20.0
HANDOVER_S = 30.0
"""How long a requeued SLURM job waits for processes of its last start to end."""


class RunLock:
    """Holds a run directory while this process lives and no other job takes it over.

    A file lock decides on one host, and across hosts if the file system has such locks; otherwise the time of
    the last heartbeat does. A killed process loses the lock at once. A job that was wrongly taken for dead
    (its node was cut off, its process suspended) finds another token in the holder's file; it must not write.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock; waits until another host's job counts as dead. UserError if a live job has it."""
        self._run_dir, self._holder = run_dir, run_dir / HOLDER_FILE
        self._token = uuid.uuid4().hex
        self._last_beat = time.monotonic()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Not per thread: one thread may release what another acquired.
            self._lock = FileLock(run_dir / LOCK_FILE, thread_local=False, fallback_to_soft=False)
            self._acquire(_read(self._holder))
            self._holder.write_text(json.dumps(self._describe()) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"run_dir {run_dir}: {getattr(error, 'strerror', None) or error}") from None

    def check(self) -> None:
        """To be called before each write: UserError if the directory is no longer this job's."""
        try:
            found = json.loads(self._holder.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        except OSError:
            return  # Another fault of the file system: it passes, or ends the run elsewhere.
        if found.get("token") != self._token:
            by = f"taken over by {_name(found)}" if found else f"taken away ({HOLDER_FILE} is gone)"
            raise UserError(f"run_dir {self._run_dir} was {by}; this job stops, and writes nothing more")

    def beat(self) -> None:
        """Checks the lock and refreshes the heartbeat; to be called at every step."""
        self.check()
        if time.monotonic() - self._last_beat > HEARTBEAT_S:
            self._last_beat = time.monotonic()
            with suppress(OSError):  # A full disk must not end the run here.
                os.utime(self._holder)

    def release(self) -> None:
        """Releases the directory, unless another job has taken it over."""
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
            # A process of the dead job may still hold it; it will find another token.
            if not restarted and not elsewhere:
                raise self._in_use(before) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            # Without locks the heartbeat decides on one host, too.
            if before and not restarted and not elsewhere:
                self._wait_for_silence(before)

    def _wait_for_silence(self, before: dict[str, Any]) -> None:
        """Waits until the holder's heartbeat is too old, or its file is gone; UserError if it beats."""
        message = f"run_dir {self._run_dir} was in use by {_name(before)}; waiting for it to end"
        first = None
        with suppress(FileNotFoundError):
            while time.time() - (beat := self._holder.stat().st_mtime) < DEAD_AFTER_S:
                if first is None:
                    first = beat
                    print(message, flush=True)
                if beat > first:
                    raise self._in_use(_read(self._holder))
                time.sleep(min(beat + DEAD_AFTER_S - time.time() + 1, HEARTBEAT_S))

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
