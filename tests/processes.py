"""Starts programs as a user or a launcher does, each in a process of its own.

Imports of torch, DeepSpeed and transformers take seconds. So a process is a fork of a server that has made
them once, and none of ours; arguments, environment, working directory and search path are those that Python
would give a program. Tests of what a start itself prints or needs take ``subprocess``.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parents[1]

HAS_GPU = Path("/dev/nvidiactl").exists()


def is_of_the_gpu(arguments: Sequence[str]) -> bool:
    """Whether a command line of pytest names the GPU's tests, and no others beside them."""
    named = [argument for argument in arguments if "tests" in Path(argument).parts]
    return bool(named) and all("tests/gpu" in Path(argument).as_posix() for argument in named)


# The suite is of the CPU, in this process and in those that it starts, but for `make test-gpu`. Where there
# is no GPU nothing is set.
if HAS_GPU and not is_of_the_gpu(sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

_SETTINGS = ("PYTHONPATH", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
USER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
"""What programs are started with: the user's own variables, none that a helper or a library would set."""

IMPORTED = (
    *("torch", "deepspeed", "transformers", "peft", "webdataset", "accelerate.tracking", "jaxtyping", "rich"),
    *("pydantic", "torch.utils.tensorboard", "transformers.integrations", "transformers.generation"),
    *("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"),
)


class Process:
    """A started program; used like ``subprocess.Popen``."""

    def __init__(self, connection: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self._connection, self._out, self._err = connection, out, err
        for file in (connection, out, err):
            weakref.finalize(self, file.close)
        self.returncode: int | None = None
        self.pid = self._read()

    def _read(self) -> int:
        (number,) = struct.unpack("i", self._connection.recv(4, socket.MSG_WAITALL))
        return number

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; returns the exit code."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._read()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; returns what it wrote to stdout and, where that is apart, to stderr."""
        self.wait(timeout)
        return self._text(self._out), "" if self._err is self._out else self._text(self._err)

    def send_signal(self, number: int) -> None:
        """Signals it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    @staticmethod
    def _text(file: IO[bytes]) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")


class Server:
    """The process that others are forked from; ends with this one."""

    def __init__(self, python: str | Path = sys.executable) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._address = str(Path(self._directory.name) / "socket")
        command = [str(python), str(Path(__file__).resolve()), self._address]
        env = USER_ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, cwd="/")
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the server; processes that it has started go on."""
        self._process.communicate()
        self._directory.cleanup()

    def start(
        self,
        command: Sequence[object],
        *,
        env: Mapping[str, str] = USER_ENVIRONMENT,
        cwd: Path | str = "/",
        merge: bool = False,
    ) -> Process:
        """Starts ``SCRIPT ...``, ``-m MODULE ...`` or ``-c CODE ...``; ``merge`` writes stderr to stdout."""
        connection = self._connect()
        out = tempfile.TemporaryFile()  # noqa: SIM115
        err = out if merge else tempfile.TemporaryFile()  # noqa: SIM115
        job = {"command": [str(part) for part in command], "env": dict(env), "cwd": str(cwd)}
        data = json.dumps(job).encode()
        socket.send_fds(connection, [struct.pack("i", len(data))], [out.fileno(), err.fileno()])
        connection.sendall(data)
        return Process(connection, out, err)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 240
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                connection.connect(self._address)
                return connection
            assert self._process.poll() is None, "the server of processes did not start"
            assert time.monotonic() < deadline
            time.sleep(0.02)


_server: Server | None = None


def start_python(command: Sequence[object], **more) -> Process:
    """Starts a program; see ``Server.start``."""
    global _server
    if _server is None:
        _server = Server()
    return _server.start(command, **more)


def run_python(
    command: Sequence[object], *, timeout_s: float = 240, **more
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    process = start_python(command, **more)
    try:
        out, err = process.communicate(timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess([str(part) for part in command], process.wait(), out, err)


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_rank(script: Path | str, args: Sequence[object], rank: int, num_ranks: int, port: int) -> Process:
    """Starts one process of a job, with the variables that a launcher sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    env = {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()}
    return start_python(
        [script, *args], env=USER_ENVIRONMENT | env | {"MASTER_ADDR": "127.0.0.1"}, merge=True
    )


def start_ranks(script: Path | str, args: Sequence[object], num_ranks: int) -> list[Process]:
    """Starts all processes of a job."""
    port = free_port()
    return [start_rank(script, args, rank, num_ranks, port) for rank in range(num_ranks)]


def run_ranks(
    script: Path | str, args: Sequence[object], num_ranks: int, timeout_s: float = 240
) -> list[str]:
    """Runs ``num_ranks`` processes to their end and returns their outputs; all must succeed."""
    processes = start_ranks(script, args, num_ranks)
    try:
        outputs = [process.communicate(timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    return outputs


# --- in the server and its forks ---


def _serve(address: str) -> None:
    """Forks a process for each connection, and sends its number and then its exit code."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name.partition(".")[0] == "dehvf_ds"]
    # Forks share the pages of what is not collected.
    gc.freeze()
    wakeup, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, wakeup, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(connection, 4, 2)
            job = json.loads(connection.recv(struct.unpack("i", size)[0], socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                _become(job, files)
            for file in files:
                os.close(file)
            running[pid] = connection
            connection.sendall(struct.pack("i", pid))
        if wakeup in ready:
            os.read(wakeup, 4096)
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with suppress(OSError), running.pop(ended[0]) as connection:
                        connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(ended[1])))


def _become(job: dict, files: Sequence[int]) -> None:
    """Runs a job in this fork and ends it."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, start=1):
            os.dup2(file, number)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        gc.unfreeze()
        code = _run(job["command"])
        # As Python ends: threads first, then what was registered.
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(command: list[str]) -> int:
    """Runs a program; returns the exit code that Python would end with."""
    kind, *rest = command
    try:
        if kind == "-m":
            sys.argv, sys.path[:0] = rest, [str(Path.cwd())]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            script = Path(kind).resolve()
            sys.argv, sys.path[:0] = command, [str(script if script.is_dir() else script.parent)]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    # Not the folder of the tests: programs get their own.
    sys.path.pop(0)
    _serve(sys.argv[1])
