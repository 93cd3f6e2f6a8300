"""A key-value store between the ranks' hosts: results of rank 0, and why the job failed.

Rank 0 (under torchrun its agent) serves torch's TCPStore at MASTER_ADDR:MASTER_PORT, before any backend
starts. Values go through it without a time limit. A rank that fails reports why before it ends; a thread of
every other rank reads that and ends its process, even while the main thread hangs in a collective.
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
POLLS_PER_HEARTBEAT = 5

CHUNK_BYTES = 4 << 20
"""What travels at a time; torch's store takes 8 MiB at most."""

MAX_MISSED_HEARTBEATS = 36
"""A rank that misses so many is gone. Counted in heartbeats of one's own: a job may be suspended."""

GONE = f"{MAX_MISSED_HEARTBEATS * POLLS_PER_HEARTBEAT * POLL_S:.0f} s"

GRACE_S = 2.0
"""How long a rank that has heard of a failure may take to hit the same error and exit on its own."""

ACKNOWLEDGE_S = 10.0
"""How long a failed rank waits until the others have read why."""

JOIN_S = 120.0
"""The same while some ranks are not connected yet: imports from a cold file system take long."""


@dataclass(frozen=True)
class Failure:
    """Why the job ends: a rank's error in one line (may be empty), and the exit code of all ranks."""

    rank: int
    line: str
    code: int


class RankStore:
    """One rank's connection to the store.

    Raises JobError if rank 0 did not come within ``timeout_minutes``, UserError if the store belongs to
    another job, and DistNetworkError if rank 0 cannot listen at MASTER_PORT.
    """

    def __init__(self, rank: int, size: int, timeout_minutes: float):
        self._rank, self._size = rank, size
        # torchrun's agent serves a store of its own.
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            _wait_for_server(timeout_minutes)
        else:
            _raise_open_files_limit()
        self.store = _connect(size, serves=serves)
        self._client = _connect(size)
        nonce = uuid.uuid4().hex
        if self._client.compare_set(f"joined/{rank}", "", nonce).decode() != nonce:
            raise UserError(
                f"port {os.environ['MASTER_PORT']}, where the ranks meet, is used by another job; name "
                "another: deepspeed --master_port 29501, torchrun --master-port 29501"
            )
        self._num_calls, self._num_polls = 0, 0
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self.cleanups: list[Callable[[], object]] = []
        """Called before a failure elsewhere ends this process."""
        self._client.add(f"heartbeat/{rank}", 1)
        self._client.add("num_joined", 1)
        args = (_connect(size),)
        threading.Thread(target=self._watch_ranks, args=args, name="watch ranks", daemon=True).start()
        threading.Thread(target=self._watch_store, name="watch store", daemon=True).start()

    def wait_for_all(self, timeout_minutes: float) -> None:
        """Waits until every rank is connected; JobError names those that did not come."""
        end = time.monotonic() + 60 * timeout_minutes
        while not self._all_joined(self._client):
            if time.monotonic() > end:
                missing = [rank for rank in range(self._size) if not self._client.check([f"joined/{rank}"])]
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise JobError(
                    f"these of {self._size} ranks did not connect within {timeout_minutes:g} minutes: {names}"
                )
            time.sleep(0.2)

    def _all_joined(self, client: Any) -> bool:
        return client.add("num_joined", 0) >= self._size

    def broadcast(self, value: Callable[[], Any]) -> Any:
        """Returns what rank 0 computes (it must pickle) on every rank; no time limit. All must call it."""
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
        """Every rank's value on rank 0, nothing on the others; no time limit. All must call it."""
        key = self._next_key()
        if self._rank:
            self._write(f"{key}/{self._rank}", value)
            return []
        values = [value]
        for rank in range(1, self._size):
            values.append(self._read(f"{key}/{rank}"))
            self._delete(f"{key}/{rank}")
        return values

    def close(self) -> None:
        """Waits until every rank has finished, and stops watching for failures."""
        self._client.add("num_finished", 1)
        pause_s = 0.02
        while self._client.add("num_finished", 0) < self._size:
            time.sleep(pause_s)
            pause_s = min(1.0, 1.5 * pause_s)
        self._closed.set()
        # All have finished: a store that is gone now is no failure.
        with suppress(DistError):
            if self._rank:
                self._client.add("num_closed", 1)
            else:
                self._wait_for_others(self._client, "num_closed")

    def report_failure(self, line: str, code: int, *, details: Callable[[], object] | None = None) -> int:
        """Reports to the other ranks and on rank 0's console why this rank ends.

        ``details`` prints more, if no other rank failed before. Returns the code to end with: that of the
        first rank that failed.
        """
        if not self._ending.acquire(blocking=False):
            # A watching thread is about to end this process.
            time.sleep(2 * ACKNOWLEDGE_S)
        self._closed.set()
        own = Failure(self._rank, line, code)
        try:
            first = _publish(self._client, own)
            if first == own and details is not None:
                details()
            self._print_once(self._client, own if first.line == line else first)
        except DistError:
            # Rank 0 is gone, and with it the store.
            print_failure(own)
            return code
        return first.code

    def _print_once(self, client: Any, failure: Failure) -> None:
        """Prints the failure on rank 0, or on the failed rank where rank 0 does not do it."""
        if self._rank == 0:
            print_failure(failure)
            client.set("printed", "1")
            self._wait_for_others(client, "num_acknowledged")
            return
        end = time.monotonic() + ACKNOWLEDGE_S
        while not client.check(["printed"]):
            if time.monotonic() > end:
                if failure.rank == self._rank:
                    print_failure(failure)
                break
            time.sleep(0.1)
        # The last use of the store: rank 0 may end.
        client.add("num_acknowledged", 1)

    def _wait_for_others(self, client: Any, counter: str) -> None:
        """Waits until the other ranks have increased ``counter``, or have had the time to."""
        end, joined = time.monotonic() + JOIN_S, False
        while client.add(counter, 0) < self._size - 1 and time.monotonic() <= end:
            if not joined and self._all_joined(client):
                joined, end = True, time.monotonic() + ACKNOWLEDGE_S
            time.sleep(0.05)

    def _watch_ranks(self, client: Any) -> None:
        """Ends this process after another rank's failure, or where rank 0's store breaks."""
        try:
            failure = self._wait_for_failure(client)
            if failure is None:
                return
            time.sleep(GRACE_S)
        except Exception as error:
            failure = Failure(self._rank, f"rank 0 is gone: {one_line(error)}", 1)
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        try:
            if failure.code == 1 and "DEHVF_STACKS" in os.environ:
                # The failed rank may have waited for this one: its stacks go into its log.
                signal.raise_signal(signal.SIGUSR2)
            if failure.rank == self._rank:
                print_failure(failure)
            else:
                self._print_once(client, failure)
        finally:
            self._abort(failure.code)

    def _wait_for_failure(self, client: Any) -> Failure | None:
        """Polls for a failure, and sends heartbeats; None once this rank has finished."""
        last, missed = [0] * self._size, [0] * self._size
        while not self._closed.wait(POLL_S):
            if client.check(["failure"]):
                return Failure(**json.loads(client.get("failure")))
            self._num_polls += 1
            if self._num_polls % POLLS_PER_HEARTBEAT:
                continue
            client.add(f"heartbeat/{self._rank}", 1)
            for rank in range(1, self._size if self._rank == 0 else 0):
                beats = client.add(f"heartbeat/{rank}", 0)
                # A rank that is not connected yet is ``wait_for_all``'s.
                missed[rank] = missed[rank] + 1 if beats and beats == last[rank] else 0
                last[rank] = beats
                if missed[rank] == MAX_MISSED_HEARTBEATS:
                    _publish(client, Failure(rank, f"lost: no heartbeat for {GONE}", 1))
        return None

    def _watch_store(self) -> None:
        """Ends this process where the store does not answer: a host that lost power closes no connection."""
        last, missed = -1, 0
        while not self._closed.wait(POLLS_PER_HEARTBEAT * POLL_S) and not self._ending.locked():
            missed = missed + 1 if self._num_polls == last else 0
            last = self._num_polls
            if missed == MAX_MISSED_HEARTBEATS and self._ending.acquire(blocking=False):
                try:
                    print_failure(Failure(self._rank, f"rank 0 is gone: no answer for {GONE}", 1))
                finally:
                    self._abort(1)

    def _abort(self, code: int) -> None:
        def clean_up() -> None:
            for cleanup in self.cleanups:
                with suppress(Exception):
                    cleanup()

        try:
            # In a thread: on a file system that hangs it would never end.
            thread = threading.Thread(target=clean_up, daemon=True)
            thread.start()
            thread.join(ACKNOWLEDGE_S)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _next_key(self) -> str:
        self._num_calls += 1
        return f"call/{self._num_calls}"

    def _write(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        starts = range(0, len(data), CHUNK_BYTES)
        for number, start in enumerate(starts):
            self._client.set(f"{key}/{number}", data[start : start + CHUNK_BYTES])
        # Last: whoever sees it finds all chunks.
        self._client.set(key, str(len(starts)))

    def _read(self, key: str) -> Any:
        # By polling: Python handles signals between, and torch's own wait prints pages when it times out.
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


def _raise_open_files_limit() -> None:
    """Rank 0 needs a descriptor for each connection, and each rank has several."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_for_server(timeout_minutes: float) -> None:
    # Before torch's client tries, which prints pages where it fails.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + 60 * timeout_minutes
    while True:
        with suppress(OSError), socket.create_connection((host, port), timeout=10):
            return
        if time.monotonic() > end:
            raise JobError(f"rank 0 did not come to {host}:{port} in {timeout_minutes:g} minutes")
        time.sleep(0.2)


def _connect(size: int, *, serves: bool = False) -> Any:
    """The store by a new connection: while one is waited on, all who share it wait."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, size, serves, wait_for_workers=False)
    # A job that torchrun restarts must not read what its last start left, nor what one of another size did.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"{size}-{attempt}", store)


def _publish(client: Any, failure: Failure) -> Failure:
    """Stores a failure, unless there is one already; returns the one that is stored."""
    return Failure(**json.loads(client.compare_set("failure", "", json.dumps(asdict(failure)))))


def print_failure(failure: Failure) -> None:
    """Prints a failure's line to stderr, if it has one."""
    rank = f" (rank {failure.rank})" if failure.rank else ""
    if failure.line:
        with suppress(OSError):
            print(f"error{rank}: {failure.line}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
