"""Where a shard's bytes come from: a file, a copy of it on a local disk, or a stream that is read forward.

Each gives any byte range of any shard, so the order of the samples is the same wherever the shards lie.
Addresses (``https://``, ``s3://``, ``gs://``, ``hf://``, ..) are fsspec's; some need a package of their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError
from dehvf_ds.data.shards import one_line

MAX_OPEN_SHARDS = 64
CHUNK_BYTES = 1 << 20
# A copy takes minutes at most; what is older was left by a killed process.
STALE_S = 3600.0

# A server that does not answer, or brings nothing while it is waited for, is asked again after so long ..
CONNECT_S = 30
STALL_S = 60
# .. and for so long.
RETRY_WITHIN_S = 120.0
RETRY_PAUSE_S = 2.0

_NO_FILE = "there is no such file; look at data.location, or copy the shard there"
_REMEDIES = {
    401: "the server wants a login; put it into the address, or use pipe: with a command that has it",
    403: "the server refuses it; look at permissions, or make a signed address anew that may have expired",
    404: _NO_FILE,
    410: _NO_FILE,
    429: "the server has too many requests; try again later, or with a data.cache_dir",
}
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^?\s]*)\?[^\s'\"]*")


@dataclass(frozen=True)
class ShardFile:
    """A shard as the manifest names it: file name, size in bytes, hash."""

    name: str
    num_bytes: int
    sha256: str


class Storage:
    """Byte ranges of shards by the shard's number; the last ``MAX_OPEN_SHARDS`` stay open.

    Opening a file for each read would load a parallel file system's metadata server.
    """

    def __init__(self, shards: Sequence[ShardFile], open_shard: Callable[[ShardFile], _OpenShard]):
        """Opens nothing yet."""
        self._shards = shards
        self._open_shard = open_shard
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._owner, self._parents = os.getpid(), self._opened

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Reads a range; fewer bytes at the shard's end.

        Raises:
            OSError: what cannot be read or fetched, in one line that names the file, address or command.
            UserError: the cache cannot be written.
        """
        if self._owner != os.getpid():
            # A forked worker: the parent's streams have a position that is not ours, and are not ours to end.
            self._parents, self._opened, self._owner = self._opened, OrderedDict(), os.getpid()
        try:
            if shard not in self._opened:
                while len(self._opened) >= MAX_OPEN_SHARDS:
                    self._opened.popitem(last=False)[1].close()
                self._opened[shard] = self._open_shard(self._shards[shard])
            self._opened.move_to_end(shard)
            return self._opened[shard].read(offset, size)
        except OSError:
            if opened := self._opened.pop(shard, None):
                opened.close()
            raise

    def close(self) -> None:
        """Lets go of what reads have opened; a later read opens it again."""
        while self._opened and self._owner == os.getpid():
            self._opened.popitem()[1].close()


def build_storage(
    shards: Sequence[ShardFile], location: str, *, cache_dir: str | None, cache_bytes: float
) -> Storage:
    """Chooses how shards are read; the settings are those of ``DataConfig``."""
    if location.startswith("pipe:"):
        if "{}" not in location:
            raise UserError(f"data.location {location}: needs {{}} where the shard's name goes")
    elif is_remote(location):
        try:
            fsspec.get_filesystem_class(location.partition("://")[0])
        except (ImportError, ValueError) as error:
            raise UserError(f"data.location {shown(location)}: {one_line(error)}") from None
    if cache_dir is not None:
        largest = max(shards, key=lambda shard: shard.num_bytes)
        if largest.num_bytes > cache_bytes:
            raise UserError(
                f"data.cache_gb {cache_bytes / 1e9:g}: less than the largest shard, {largest.name} "
                f"({largest.num_bytes / 1e9:.3g} GB)"
            )
        return Storage(shards, _Cache(location, Path(cache_dir), cache_bytes).open)
    if is_remote(location):
        return Storage(shards, lambda shard: _PassingShard(location, shard))
    return Storage(shards, lambda shard: _WholeShard(Path(location) / shard.name))


def is_remote(location: str) -> bool:
    """Whether shards come through a command or the network and not from a directory."""
    return location.startswith("pipe:") or "://" in location


def shown(text: str) -> str:
    """A text without the passwords and signatures of the addresses in it."""
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


class _WholeShard:
    """A file read at random."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return _pread(self._descriptor, offset, size)

    def close(self) -> None:
        os.close(self._descriptor)


class _PassingShard:
    """A shard read from its beginning, once each time it is opened.

    What has passed lies in an unnamed temporary file until the shard is left: the rows of a shuffle window
    are asked for out of order, and a row once for each of its captions. Each loader worker reads for itself;
    with several of them a ``cache_dir`` saves the others' traffic. Resuming within a shard reads it up to
    there. Up to ``MAX_OPEN_SHARDS`` shards a worker lie in the temporary directory (``TMPDIR``).
    """

    def __init__(self, location: str, shard: ShardFile):
        self._shard = shard
        self._chunks = _chunks(location, shard)
        self._passed = tempfile.TemporaryFile(prefix="dehvf-shard-")  # noqa: SIM115
        self._num_bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        while self._num_bytes < min(offset + size, self._shard.num_bytes):
            chunk = next(self._chunks)
            self._passed.write(chunk)
            self._num_bytes += len(chunk)
        self._passed.flush()
        return _pread(self._passed.fileno(), offset, size)

    def close(self) -> None:
        self._chunks.close()
        self._passed.close()


_OpenShard = _WholeShard | _PassingShard


class _Cache:
    """Copies of shards on a fast local disk, made when first asked for, one copier a node.

    A copy is named after the shard's hash, which is checked on the way, so several data sets and runs may
    share a cache. The longest unused copies leave first; a process that still reads one keeps it until then.
    """

    def __init__(self, location: str, directory: Path, max_bytes: float):
        self._location = location
        self._directory = directory
        self._max_bytes = max_bytes
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {directory}: {one_line(error)}") from None

    def open(self, shard: ShardFile) -> _WholeShard:
        path = self._directory / f"{shard.sha256}.tar"
        try:
            # Shards share these locks, so that the cache holds no lock file for each of them.
            with FileLock(self._directory / f".lock-copy-{shard.sha256[:2]}"):
                if not path.is_file():
                    self._copy(shard, path)
                # The time of use, for who leaves first; under the lock, so that it is not evicted unread.
                os.utime(path)
                return _WholeShard(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise UserError(f"data.cache_dir {self._directory}: {one_line(error)}") from None
            raise

    def _copy(self, shard: ShardFile, path: Path) -> None:
        digest = hashlib.sha256()
        with atomic_file(path) as part:
            with FileLock(self._directory / ".lock-room"):
                self._make_room(shard.num_bytes)
                with part.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shard.num_bytes)
            with part.open("r+b") as file, contextlib.closing(_chunks(self._location, shard)) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.truncate()
            if digest.hexdigest() != shard.sha256:
                raise OSError("its bytes do not have the manifest's sha256; copy it again")

    def _make_room(self, num_bytes: int) -> None:
        """Removes the longest unused copies until ``num_bytes`` more fit."""
        found = []
        for path in self._directory.iterdir():
            # Another process may remove it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".part"):
                    state = path.stat()
                    found.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found, key=lambda item: item[0]):
            if total + num_bytes <= self._max_bytes:
                return
            if path.suffix == ".tar" or used < time.time() - STALE_S:
                path.unlink(missing_ok=True)
                total -= size


def _chunks(location: str, shard: ShardFile) -> Generator[bytes, None, None]:
    """A shard's bytes in order; it may be closed early. ``OSError`` where that is not the whole shard."""
    if location.startswith("pipe:"):
        chunks = _from_command(location.removeprefix("pipe:").replace("{}", shlex.quote(shard.name)))
    elif is_remote(location):
        chunks = _from_server(f"{location.rstrip('/')}/{shard.name}", shard.num_bytes)
    else:
        chunks = _from_file(Path(location) / shard.name)
    num_bytes = 0
    try:
        with contextlib.closing(chunks):
            for chunk in chunks:
                if not num_bytes and chunk.lstrip()[:1] == b"<" and b"ustar" not in chunk[257:263]:
                    raise OSError("sends a web page, not a shard (a login?); open it in a browser")
                num_bytes += len(chunk)
                yield chunk
        if num_bytes < shard.num_bytes:
            early = f"ended after {num_bytes} of {shard.num_bytes} bytes"
            raise OSError(f"{early}; copy it again, or try again")
    except OSError as error:
        # Without the number: one of no space or permission is not the cache's.
        raise OSError(shown(one_line(error))) from error


def _from_file(path: Path) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _from_command(command: str) -> Generator[bytes, None, None]:
    """What a command of the shell writes, which is the file only if the command says so in the end."""
    with tempfile.TemporaryFile(prefix="dehvf-stderr-") as said:
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read(CHUNK_BYTES):
                yield chunk
            if code := process.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise OSError(f"the command ended with code {code}{f': {lines[-1]}' if lines else ''}")
        finally:
            process.terminate()
            process.stdout.close()
            process.wait()


def _from_server(address: str, num_bytes: int) -> Generator[bytes, None, None]:
    """A file of fsspec's, read forward; where it breaks off it is asked for again and read up to there."""
    passed, failing_since = 0, None
    while True:
        place = 0
        try:
            with _open_address(address, num_bytes) as file:
                while chunk := file.read(CHUNK_BYTES):
                    place += len(chunk)
                    if place > passed:
                        new, passed, failing_since = chunk[passed - place :], place, None
                        yield new
            return
        except Exception as error:
            failing_since = failing_since or time.monotonic()
            if not _may_pass(error) or time.monotonic() - failing_since > RETRY_WITHIN_S:
                raise OSError(_told(error)) from error
            time.sleep(RETRY_PAUSE_S)


def _open_address(address: str, num_bytes: int) -> Any:
    options: dict[str, Any] = {}
    how: dict[str, Any] = {"block_size": 8 * CHUNK_BYTES}
    if address.startswith(("http://", "https://")):
        # Slow to import.
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {
            "timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S),
            "headers": {"Accept-Encoding": "identity"},
            "read_bufsize": CHUNK_BYTES,
            # Proxies, as curl takes them.
            "trust_env": True,
        }
        # A forked worker would end a session that it shares with its parent.
        options["skip_instance_cache"] = True
        # One request for the whole, as not all servers know ranges; without a size another would ask for it.
        how = {"block_size": 0, "size": num_bytes}
    filesystem, path = fsspec.url_to_fs(address, **options)
    return filesystem.open(path, "rb", **how)


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help."""
    from aiohttp import (
        ClientConnectionError,
        ClientConnectorDNSError,
        ClientConnectorError,
        ClientPayloadError,
    )

    if status := getattr(error, "status", None):
        return status in (408, 429) or status >= 500
    passing = (TimeoutError, ConnectionError, ClientConnectionError, ClientPayloadError)
    is_refused = isinstance(error, ClientConnectorError) and not isinstance(error, ClientConnectorDNSError)
    return isinstance(error, passing) and not is_refused


def _told(error: Exception) -> str:
    """An error of a server or the network in one line, with what to do."""
    if isinstance(error, FileNotFoundError):
        return _NO_FILE
    status = 403 if isinstance(error, PermissionError) else getattr(error, "status", None)
    if status:
        default = "the server fails; try again later" if status >= 500 else "look at data.location"
        return f"HTTP {status}: {_REMEDIES.get(status, default)}"
    said = one_line(error) or type(error).__name__
    return f"{said}; look at data.location, and whether this machine has a network"


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Reads a range; a network file system may give it in pieces."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
