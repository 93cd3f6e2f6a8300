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
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

POLL_S = 1.0
BEAT_POLLS = 5
"""Polls of a rank from one sign of life to the next."""

GONE_BEATS = 9
"""A rank without a sign of life for so many beats of rank 0 is gone. Not seconds: a job may be suspended."""

GRACE_S = 2.0
"""How long a rank that heard of a failure may find the same one itself, and end by that."""

LINGER_S = 10.0
"""How long a failed rank stays for the others to hear why."""


class JobError(Exception):
    """Ends the job with one line and ``code``: no mistake of the user's, nor of a program."""

    code = 1


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
            DistNetworkError: rank 0 cannot listen at MASTER_PORT.
        """
        self._rank, self._size = rank, size
        # Of torchrun's store this is a client, too.
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            _wait_for_server(timeout_minutes)
        self.store = _connect(size, serves=serves)
        self._client = _connect(size)
        self._num_calls = 0
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self.cleanups: list[Callable[[], object]] = []
        """Called before a failure elsewhere ends this process."""
        self._client.add(f"met/{rank}", 1)
        client = _connect(size)
        threading.Thread(target=self._watch, args=(client,), name="rank store", daemon=True).start()

    def wait_for_all(self, timeout_minutes: float) -> None:
        """Waits until every rank is there.

        Raises:
            JobError: names those that did not come.
        """
        end = time.monotonic() + 60 * timeout_minutes
        missing = list(range(self._size))
        while missing := [rank for rank in missing if not self._client.add(f"met/{rank}", 0)]:
            if time.monotonic() > end:
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise JobError(
                    f"of {self._size} ranks these did not come in {timeout_minutes:g} minutes: {names}"
                )
            time.sleep(0.1)

    def broadcast(self, value: Callable[[], Any]) -> Any:
        """Gives what rank 0 computes to all, which wait as long as that takes. Every rank must call it.

        Args:
            value: called on rank 0 alone; its result must pickle.
        """
        key = self._next_key()
        if self._rank == 0:
            result = value()
            self._client.set(key, pickle.dumps(result))
            return result
        received = pickle.loads(self._read(key))
        if self._client.add(f"{key}/read", 1) == self._size - 1:
            self._client.delete_key(key)
            self._client.delete_key(f"{key}/read")
        return received

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, which waits for them as long as they take; nothing on the others."""
        key = self._next_key()
        if self._rank:
            self._client.set(f"{key}/{self._rank}", pickle.dumps(value))
            return []
        values = [value]
        for rank in range(1, self._size):
            values.append(pickle.loads(self._read(f"{key}/{rank}")))
            self._client.delete_key(f"{key}/{rank}")
        return values

    def leave(self) -> None:
        """Waits until every rank is here, and ends the watch."""
        self._client.add("left", 1)
        while self._client.add("left", 0) < self._size:
            time.sleep(0.05)
        self._closed.set()
        if self._rank:
            self._client.add("closed", 1)
            return
        self._linger(self._client, "closed")

    def fail(self, line: str, code: int, *, details: Callable[[], object] | None = None) -> int:
        """Tells the others why this rank ends, and whoever reads rank 0's console why all do.

        Args:
            line: what happened.
            code: the exit code that this rank would end with.
            details: prints more, where the failure is this rank's own.

        Returns:
            The code to end with: that of the first rank that failed.
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
        end = time.monotonic() + LINGER_S
        while client.add(name, 0) < self._size - 1 and time.monotonic() < end:
            time.sleep(0.05)

    def _watch(self, client: Any) -> None:
        """Ends this process after another rank's failure."""
        polls = 0
        beats, still = [0] * self._size, [0] * self._size
        while not self._closed.wait(POLL_S):
            try:
                if client.check(["failure"]):
                    failure = Failure(**json.loads(client.get("failure")))
                    time.sleep(GRACE_S)
                    if self._ending.acquire(blocking=False):
                        self._tell(client, failure)
                        self._end(failure.code)
                    return
                polls += 1
                if polls % BEAT_POLLS == 0:
                    client.add(f"met/{self._rank}", 1)
                    if self._rank == 0:
                        self._look_for_gone(client, beats, still)
            except DistError as error:
                if not self._closed.is_set() and self._ending.acquire(blocking=False):
                    tell(Failure(self._rank, f"rank 0 is gone: {short(error)}", 1))
                    self._end(1)
                return

    def _look_for_gone(self, client: Any, beats: list[int], still: list[int]) -> None:
        for rank in range(1, self._size):
            now = client.add(f"met/{rank}", 0)
            # One that has not come yet is waited for by others.
            still[rank] = still[rank] + 1 if now and now == beats[rank] else 0
            beats[rank] = now
            if still[rank] == GONE_BEATS:
                seconds = GONE_BEATS * BEAT_POLLS * POLL_S
                _announce(client, Failure(rank, f"gone: no sign of it for {seconds:.0f} s", 1))

    def _end(self, code: int) -> None:
        for cleanup in self.cleanups:
            try:
                cleanup()
            except Exception as error:
                print(f"warning: {short(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _next_key(self) -> str:
        self._num_calls += 1
        return f"call/{self._num_calls}"

    def _read(self, key: str) -> bytes:
        # Asked again and again: signals are heard between, and a wait of torch's that ends prints pages.
        pause_s = 0.002
        while not self._client.check([key]):
            time.sleep(pause_s)
            pause_s = min(0.2, 1.5 * pause_s)
        return self._client.get(key)


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
    # A job that torchrun starts again must not read what the last start left.
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


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
    if failure.line:
        print(failure.told(), file=sys.stderr, flush=True)


def short(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
