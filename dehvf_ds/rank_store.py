"""What the ranks tell one another from host to host, beside the collectives of their devices.

Rank 0 keeps a store (under torchrun its agent does) that the others reach by MASTER_ADDR and MASTER_PORT,
before any backend starts. Over it go results of what rank 0 does alone, however long that takes, and
failures: a rank that fails says why before it ends, and a thread of every other rank then ends its process,
wherever it waits.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

from dehvf_ds.config import JobError, UserError

POLL_S = 1.0
BEAT_POLLS = 5
"""Polls of a rank from one sign of life to the next."""

PIECE_BYTES = 4 << 20
"""What travels at a time; torch's store takes 8 MiB at most."""

GONE_BEATS = 36
"""A rank without a sign of life for so many beats of rank 0 is gone. Not seconds: a job may be suspended."""

GRACE_S = 2.0
"""How long a rank that heard of a failure may find the same one itself, and end by that."""

LINGER_S = 10.0
"""How long a failed rank stays for the others to hear why."""

ARRIVAL_S = 120.0
"""The same while ranks have not come yet: a cold file system makes imports last."""


@dataclass(frozen=True)
class Failure:
    """Why the job ends.

    Attributes:
        rank: whose failure it is.
        line: what happened, in one line; empty where there is nothing to say.
        code: the exit code of all ranks.
    """

    rank: int
    line: str
    code: int

    def told(self) -> str:
        """The line for the console."""
        return f"error (rank {self.rank}): {self.line}" if self.rank else f"error: {self.line}"


class RankStore:
    """One rank's end of the line."""

    def __init__(self, rank: int, size: int, timeout_minutes: float):
        """Opens the store on rank 0, and reaches it from the others.

        Args:
            rank: this process's number.
            size: processes in the job.
            timeout_minutes: how long rank 0 may take to come.

        Raises:
            JobError: it did not come.
            UserError: who listens there is rank 0 of another job.
            DistNetworkError: rank 0 cannot listen at MASTER_PORT.
        """
        self._rank, self._size = rank, size
        # Of torchrun's store this is a client, too.
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            _wait_for_server(timeout_minutes)
        else:
            _raise_limit_of_files()
        self.store = _connect(size, serves=serves)
        self._client = _connect(size)
        nonce = uuid.uuid4().hex
        if self._client.compare_set(f"who/{rank}", "", nonce).decode() != nonce:
            raise UserError(
                f"port {os.environ['MASTER_PORT']}, where the ranks meet, is another job's; name another: "
                "deepspeed --master_port 29501, torchrun --master-port 29501"
            )
        self._num_calls, self._num_polls = 0, 0
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self.cleanups: list[Callable[[], object]] = []
        """Called before a failure elsewhere ends this process."""
        self._client.add(f"beat/{rank}", 1)
        self._client.add("met", 1)
        client = _connect(size)
        threading.Thread(target=self._watch, args=(client,), name="rank store", daemon=True).start()
        threading.Thread(target=self._guard, name="rank store's guard", daemon=True).start()

    def wait_for_all(self, timeout_minutes: float) -> None:
        """Waits until every rank is there; JobError names those that did not come."""
        end = time.monotonic() + 60 * timeout_minutes
        while not self._have_met(self._client):
            if time.monotonic() > end:
                missing = [rank for rank in range(self._size) if not self._client.check([f"beat/{rank}"])]
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise JobError(
                    f"of {self._size} ranks these did not come in {timeout_minutes:g} minutes: {names}"
                )
            time.sleep(0.2)

    def _have_met(self, client: Any) -> bool:
        return client.add("met", 0) >= self._size

    def broadcast(self, value: Callable[[], Any]) -> Any:
        """Gives what rank 0 computes (it must pickle) to all, however long that takes. All must call it."""
        key = self._next_key()
        if self._rank == 0:
            result = value()
            self._write(key, result)
            return result
        received = self._read(key)
        if self._client.add(f"{key}/read", 1) == self._size - 1:
            self._delete(key)
            self._client.delete_key(f"{key}/read")
        return received

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, which waits for them as long as they take; nothing on the others."""
        key = self._next_key()
        if self._rank:
            self._write(f"{key}/{self._rank}", value)
            return []
        values = [value]
        for rank in range(1, self._size):
            values.append(self._read(f"{key}/{rank}"))
            self._delete(f"{key}/{rank}")
        return values

    def leave(self) -> None:
        """Waits until every rank is here, and ends the watch."""
        self._client.add("left", 1)
        pause_s = 0.02
        while self._client.add("left", 0) < self._size:
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)
        self._closed.set()
        # All have finished: that the store is gone now is no failure.
        with suppress(DistError):
            if self._rank:
                self._client.add("closed", 1)
            else:
                self._linger(self._client, "closed")

    def fail(self, line: str, code: int, *, details: Callable[[], object] | None = None) -> int:
        """Tells the others why this rank ends, and whoever reads rank 0's console why all do.

        ``details`` prints more, if the failure is this rank's own. Returns the code to end with: that of the
        first rank that failed.
        """
        if not self._ending.acquire(blocking=False):
            # The watch is about to end this process.
            time.sleep(2 * LINGER_S)
        self._closed.set()
        own = Failure(self._rank, line, code)
        try:
            first = _announce(self._client, own)
            if first == own and details is not None:
                details()
            self._tell(self._client, own if first.line == line else first)
        except DistError:
            # Rank 0 is gone, and with it whatever it knew.
            tell(own)
            return code
        return first.code

    def _tell(self, client: Any, failure: Failure) -> None:
        """Prints the one line: rank 0 does, or the failed rank where rank 0 does not answer."""
        if self._rank == 0:
            tell(failure)
            client.set("told", "1")
            self._linger(client, "heard")
            return
        end = time.monotonic() + LINGER_S
        while not client.check(["told"]):
            if time.monotonic() > end:
                if failure.rank == self._rank:
                    tell(failure)
                break
            time.sleep(0.1)
        # The last that is asked of the store: rank 0 may end.
        client.add("heard", 1)

    def _linger(self, client: Any, name: str) -> None:
        """Stays until the others have counted themselves under ``name``, or until they had the time to."""
        began = time.monotonic()
        arrived = began if self._have_met(client) else None
        while client.add(name, 0) < self._size - 1:
            now = time.monotonic()
            if arrived is None and self._have_met(client):
                arrived = now
            if now > (began + ARRIVAL_S if arrived is None else arrived + LINGER_S):
                return
            time.sleep(0.05)

    def _watch(self, client: Any) -> None:
        """Ends this process after another rank's failure, whatever becomes of the store meanwhile."""
        try:
            failure = self._hear(client)
            if failure is None:
                return
            time.sleep(GRACE_S)
        except Exception as error:
            failure = Failure(self._rank, f"rank 0 is gone: {short(error)}", 1)
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        try:
            if failure.code == 1 and "DEHVF_STACKS" in os.environ:
                # It may be this rank that the failed one waited for: into its own log, where it is.
                signal.raise_signal(signal.SIGUSR2)
            if failure.rank == self._rank:
                tell(failure)
            else:
                self._tell(client, failure)
        finally:
            self._end(failure.code)

    def _hear(self, client: Any) -> Failure | None:
        """Waits for a failure, giving signs of life; None where all have finished."""
        beats, still = [0] * self._size, [0] * self._size
        while not self._closed.wait(POLL_S):
            if client.check(["failure"]):
                return Failure(**json.loads(client.get("failure")))
            self._num_polls += 1
            if self._num_polls % BEAT_POLLS == 0:
                client.add(f"beat/{self._rank}", 1)
                if self._rank == 0:
                    self._look_for_gone(client, beats, still)
        return None

    def _guard(self) -> None:
        """Ends this process where the store does not answer: a host that lost power closes no connection."""
        before, still = -1, 0
        while not self._closed.wait(BEAT_POLLS * POLL_S) and not self._ending.locked():
            still = still + 1 if self._num_polls == before else 0
            before = self._num_polls
            if still == GONE_BEATS and self._ending.acquire(blocking=False):
                try:
                    seconds = GONE_BEATS * BEAT_POLLS * POLL_S
                    tell(Failure(self._rank, f"rank 0 is gone: no answer for {seconds:.0f} s", 1))
                finally:
                    self._end(1)

    def _look_for_gone(self, client: Any, beats: list[int], still: list[int]) -> None:
        for rank in range(1, self._size):
            now = client.add(f"beat/{rank}", 0)
            # One that has not come yet is waited for by others.
            still[rank] = still[rank] + 1 if now and now == beats[rank] else 0
            beats[rank] = now
            if still[rank] == GONE_BEATS:
                seconds = GONE_BEATS * BEAT_POLLS * POLL_S
                _announce(client, Failure(rank, f"gone: no sign of it for {seconds:.0f} s", 1))

    def _end(self, code: int) -> None:
        def clean_up() -> None:
            for cleanup in self.cleanups:
                with suppress(Exception):
                    cleanup()

        try:
            # On a file system that hangs it would never end.
            thread = threading.Thread(target=clean_up, daemon=True)
            thread.start()
            thread.join(LINGER_S)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _next_key(self) -> str:
        self._num_calls += 1
        return f"call/{self._num_calls}"

    def _write(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        starts = range(0, len(data), PIECE_BYTES)
        for number, start in enumerate(starts):
            self._client.set(f"{key}/{number}", data[start : start + PIECE_BYTES])
        # Last: who sees it finds the pieces.
        self._client.set(key, str(len(starts)))

    def _read(self, key: str) -> Any:
        # Asked again and again: signals are heard between, and a wait of torch's that ends prints pages.
        pause_s = 0.002
        while not self._client.check([key]):
            time.sleep(pause_s)
            pause_s = min(0.2, 1.5 * pause_s)
        count = int(self._client.get(key))
        return pickle.loads(b"".join(self._client.get(f"{key}/{number}") for number in range(count)))

    def _delete(self, key: str) -> None:
        for number in range(int(self._client.get(key))):
            self._client.delete_key(f"{key}/{number}")
        self._client.delete_key(key)


def _raise_limit_of_files() -> None:
    """Lets this process have as many connections as it may: each rank holds some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_for_server(timeout_minutes: float) -> None:
    # Before torch's client tries, which prints pages where it fails.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + 60 * timeout_minutes
    while not _answers(host, port):
        if time.monotonic() > end:
            raise JobError(f"rank 0 did not come to {host}:{port} in {timeout_minutes:g} minutes")
        time.sleep(0.2)


def _connect(size: int, *, serves: bool = False) -> Any:
    """The store, by a connection of its own: one that is waited on holds up all who share it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, size, serves, wait_for_workers=False)
    # A job that torchrun starts again must not read what the last start left, nor one of another size.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"{size}-{attempt}", store)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except OSError:
        return False


def _announce(client: Any, failure: Failure) -> Failure:
    """Makes a failure known; returns the first of all ranks'."""
    told = client.compare_set("failure", "", json.dumps(asdict(failure)))
    return Failure(**json.loads(told))


def tell(failure: Failure) -> None:
    """Prints a failure's line, if it has one."""
    if not failure.line:
        return
    with suppress(OSError):
        print(failure.told(), file=sys.stderr, flush=True)


def short(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
