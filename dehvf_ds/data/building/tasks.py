"""Tasks for several processes, with progress, Ctrl-C and errors as in one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import one_line

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

REPORT_EVERY_S = 0.2
END_WITHIN_S = 5.0


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    *,
    num_workers: int,
    advance: Advance,
) -> list[Result]:
    """Runs ``function(task, advance)`` for every task and returns the results in the tasks' order.

    With one worker, or one task, in this process. An error ends everything; among several it is that of the
    earliest task, whatever the number of workers. No process outlives the call, however it ends.

    Args:
        function: of a module, for it travels to the processes by its name.
        tasks: handed out in order.
        num_workers: processes.
        advance: told of the counts that the function tells.

    Raises:
        UserError: the function's own, or a process was killed.
    """
    if num_workers < 1:
        raise UserError(f"--num-workers {num_workers}: must be at least 1")
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        return [function(task, advance) for task in tasks]
    results: dict[int, Result] = {}
    errors: dict[int, Exception] = {}
    waiting = iter(enumerate(tasks))
    with _workers(function, num_workers) as connections:
        running: dict[Connection, int] = {}

        def hand_out(connection: Connection) -> None:
            if not errors and (drawn := next(waiting, None)) is not None:
                running[connection] = drawn[0]
                _send(connection, drawn[1])

        for connection in connections:
            hand_out(connection)
        while running and not (errors and min(errors) < min(running.values())):
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                kind, value = _receive(connection)
                if kind == "count":
                    advance(value)
                    continue
                number = running.pop(connection)
                if kind == "error":
                    errors[number] = value
                else:
                    results[number] = value
                    hand_out(connection)
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(tasks))]


@contextlib.contextmanager
def _workers(function: Callable[..., Any], count: int) -> Iterator[list[Connection]]:
    # Workers come from a small server process: this one may hold threads, which a fork does not survive.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    processes, connections = [], []
    try:
        with _interrupts_held_back():
            for _ in range(count):
                ours, theirs = context.Pipe()
                connections.append(ours)
                with theirs:
                    process = context.Process(target=_work, args=(function, theirs), daemon=True)
                    process.start()
                processes.append(process)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(END_WITHIN_S)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in connections:
            connection.close()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Puts Ctrl-C off until the processes have started: they inherit the block, and never see it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Its start would lift the block.
    resource_tracker.ensure_running()
    pressed = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Another thread of this process may still take the signal.
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def _work(function: Callable[..., Any], connection: Connection) -> None:
    """A worker's life: tasks in, counts and results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    counter = _Counter(connection)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = ("result", function(task, counter.advance))
        except (UserError, OSError) as error:
            result = ("error", UserError(one_line(error)))
        counter.flush()
        connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Counter:
    """Sends counts, but not each of them."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._count = 0
        self._sent = time.monotonic()

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._sent > REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._connection.send(("count", self._count))
        self._count, self._sent = 0, time.monotonic()


def _send(connection: Connection, task: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.send(task)


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a worker process was killed; is there enough memory? Call again, with a smaller --num-workers"
        ) from None
