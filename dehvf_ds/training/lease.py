"""A run directory belongs to one live job: two would mix metrics and remove each other's checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError

LEASE_FILE = "lease.json"
STALE_S = 120.0
"""A lease of another host that was not renewed for so long is of a job that died."""

RENEW_EVERY_S = 20.0


class Lease:
    """Holds a run directory as long as this process lives.

    A lock on the file tells on one host, and wherever the file system has locks across hosts; where it has
    none, the time of the last renewal does. Killed processes lose the lock at once.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes the lease; waits for a stale one of another host to run out.

        Raises:
            UserError: another live job has it, or the directory cannot be written.
        """
        self._path = run_dir / LEASE_FILE
        self._renewed = 0.0
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            before = _read(self._path)
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run_dir {run_dir}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"run_dir {run_dir} is in use by {_holder(before)}; name another") from None
        except OSError:
            # No locks here: the times must do.
            pass
        self._wait_for_other_host(run_dir, before)
        self._write()

    def renew(self) -> None:
        """Says that the job lives; to be called at every step."""
        if time.monotonic() - self._renewed > RENEW_EVERY_S:
            self._renewed = time.monotonic()
            # A full disk must not end the run here.
            try:
                os.utime(self._path)
            except OSError:
                return

    def release(self) -> None:
        """Gives the directory back."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _wait_for_other_host(self, run_dir: Path, before: dict[str, Any]) -> None:
        if not before or before.get("host") == socket.gethostname():
            return
        told = False
        while (age := time.time() - self._path.stat().st_mtime) < STALE_S:
            if not told:
                print(f"run_dir {run_dir} was in use by {_holder(before)}; waiting for it to end", flush=True)
                told = True
            seen = self._path.stat().st_mtime
            time.sleep(min(STALE_S - age + 1, RENEW_EVERY_S))
            if not self._path.exists():
                return
            if self._path.stat().st_mtime > seen:
                self._file.close()
                raise UserError(f"run_dir {run_dir} is in use by {_holder(before)}; name another")

    def _write(self) -> None:
        self._renewed = time.monotonic()
        self._file.truncate(0)
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder(content: dict[str, Any]) -> str:
    job = f", job {content['job']}" if content.get("job") else ""
    return f"process {content.get('pid', '?')} on {content.get('host', '?')}{job}"
