"""Shards that come through a command or the network: read forward, with errors that a person can read."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

CHUNK_BYTES = 1 << 20

CONNECT_S = 30
"""A server that has not answered by then is asked again."""

RETRY_WITHIN_S = 120
"""For so long, with ``RETRIES`` pauses of 2 s; then it is an error."""

RETRIES = 30

STALL_S = 60
"""A steady transfer that brings less than a byte a second for so long is given up."""

# What a shell reports when its command was ended by a closed pipe.
_CLOSED_PIPE = (0, 141, -13)
_STATUS = re.compile(r"error: (\d{3})")
_HTTP = {
    "401": "the server wants a login; put it into the address, or use pipe: with a command that has it",
    "403": "the server refuses it; look at permissions, or make a signed address anew that may have expired",
    "404": "there is no such file; look at data.location, or copy the shard there",
    "410": "there is no such file; look at data.location, or copy the shard there",
    "429": "the server has too many requests; try again later, or with a data.cache_dir",
}
_CURL = {
    3: "the address is not well formed; look at data.location",
    5: "the proxy's name is unknown; look at https_proxy",
    6: "the server's name is unknown; look at data.location, and whether this machine has a network",
    7: "the server cannot be reached; look at data.location, and whether this machine has a network",
    18: "the transfer ended early; try again",
    28: "no answer in time; try again, or look at the network",
    47: "it redirects in circles; open the address in a browser",
    52: "the server sent nothing; try again",
    56: "the connection broke; try again",
    60: "the server's certificate is not trusted; look at the machine's certificates and clock",
}


class Stream(Protocol):
    """What a shard is read forward from."""

    def read(self, size: int, /) -> bytes:
        """Reads at most so many bytes; none at the end. Raises ``OSError`` if that is not the shard's."""
        ...


def is_remote(location: str) -> bool:
    """Whether shards come through a command or the network and not from a directory."""
    return location.startswith(("pipe:", "http://", "https://"))


def shown(what: str) -> str:
    """An address without the password or the signature that it may hold."""
    if not what.startswith(("http://", "https://")):
        return what
    return re.sub(r"(?<=://)[^/@]*@", "", what).partition("?")[0]


@contextlib.contextmanager
def open_stream(location: str, name: str, *, steady: bool = False) -> Iterator[Stream]:
    """Opens a shard for reading forward; leaving early is no error.

    Args:
        location: a directory, an ``http(s)://`` address, or a ``pipe:`` command with ``{}`` for the name.
        name: the shard's file name.
        steady: whether it is read without a pause, so that a stall is the server's and not ours.

    Raises:
        OSError: it does not exist, is no shard, or its command fails; also while it is read. The message is
            one line that names file, address or command, and what to do.
    """
    if not is_remote(location):
        with (Path(location) / name).open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="dehvf-stderr-") as said:
        if location.startswith("pipe:"):
            what = location.replace("{}", shlex.quote(name))
            process = _start(what.removeprefix("pipe:"), said)
        else:
            what = f"{location.rstrip('/')}/{name}"
            process = _start(_curl(what, steady), said)
        try:
            yield _Fetched(process, said, shown(what))
        finally:
            process.terminate()
            assert process.stdout is not None
            process.stdout.close()
            process.wait()


class _Fetched:
    """The output of a process, which is the shard only if the process says so in the end."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes], what: str):
        self._process = process
        self._said = said
        self._what = what
        self._has_begun = False

    def read(self, size: int, /) -> bytes:
        assert self._process.stdout is not None
        chunk = self._process.stdout.read(size)
        if not chunk and self._process.wait() not in _CLOSED_PIPE:
            raise OSError(f"{self._what}: {self._reason()}")
        if chunk and not self._has_begun and _is_page(chunk):
            raise OSError(
                f"{self._what}: sends a web page, not a shard (a login or an error page?); open it in a "
                "browser"
            )
        self._has_begun = True
        return chunk

    def _reason(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        said = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
        code = self._process.returncode
        if self._what.startswith("pipe:"):
            return f"the command ended with code {code}{': ' if said else ''}{said}"
        if code == 22 and (status := _STATUS.search(said)):
            default = "the server fails; try again later" if status[1] >= "500" else "look at data.location"
            return f"HTTP {status[1]}: {_HTTP.get(status[1], default)}"
        said = re.sub(r"^curl: \(\d+\) ", "", said)
        return f"{said}{': ' if said else ''}{_CURL.get(code, f'curl ended with code {code}')}"


def _curl(url: str, steady: bool) -> list[str]:
    # -S: an error's own words. What has begun is not asked for again, for its bytes have passed.
    command = ["curl", "-f", "-s", "-S", "-L", "--connect-timeout", str(CONNECT_S)]
    command += ["--retry", str(RETRIES), "--retry-delay", "2", "--retry-max-time", str(RETRY_WITHIN_S)]
    if steady:
        command += ["--speed-limit", "1", "--speed-time", str(STALL_S)]
    return [*command, url]


def _start(command: str | list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, shell=isinstance(command, str), stdout=subprocess.PIPE, stderr=said, bufsize=CHUNK_BYTES
        )
    except FileNotFoundError:
        raise OSError("curl is not installed; install it, or use pipe: with another command") from None


def _is_page(chunk: bytes) -> bool:
    return chunk.lstrip()[:1] == b"<" and b"ustar" not in chunk[257:263]
