"""Reads byte ranges of shards: from files, from copies on a local disk, or from streams read forward.

Addresses (``https://``, ``s3://``, ``gs://``,
``hf://``, ..) are fsspec's; some need a package of their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError
from dehvf_ds.data.shards import one_line

MAX_OPEN_SHARDS = 64
CHUNK_BYTES = 1 << 20
# A copy takes minutes at most; anything older was left by a killed process.
STALE_S = 3600.0
# A request that does not connect, or delivers nothing, for so long is repeated ..
CONNECT_S, STALL_S = 30, 60
# .. until nothing has come for so long.
RETRY_WITHIN_S = 120.0
RETRY_PAUSE_S = 2.0
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^?\s]*)\?[^\s'\"]*")


class ShardFile(NamedTuple):
    """A shard as in the manifest."""

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
        """Reads a range, or fewer bytes at the shard's end; an ``OSError`` explains itself in one line."""
        if self._owner != os.getpid():
            # A forked worker: the parent's streams have another position, and must not be closed here.
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
        """Closes all open shards; a later read opens its shard again."""
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
    if cache_dir is None:
        return Storage(shards, partial(_open_directly, location))
    largest = max(shards, key=lambda shard: shard.num_bytes)
    if largest.num_bytes > cache_bytes:
        raise UserError(
            f"data.cache_gb {cache_bytes / 1e9:g}: less than the largest shard, {largest.name} "
            f"({largest.num_bytes / 1e9:.3g} GB)"
        )
    return Storage(shards, _Cache(location, Path(cache_dir), cache_bytes).open)


def is_remote(location: str) -> bool:
    """Whether shards come through a command or the network and not from a directory."""
    return location.startswith("pipe:") or "://" in location


def shown(text: str) -> str:
    """A text without the passwords and signatures in its addresses."""
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


class _WholeShard:
    """A file read in any order."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return _pread(self._descriptor, offset, size)

    def close(self) -> None:
        os.close(self._descriptor)


class _PassingShard:
    """A shard read from its beginning, once each time it is opened.

    What was read stays in an unnamed file in ``TMPDIR`` until the shard is closed: rows come out of order,
    and once for each caption. Each loader worker reads for itself; a ``cache_dir`` saves that.
    """

    def __init__(self, location: str, shard: ShardFile):
        self._shard = shard
        self._chunks = _chunks(location, shard)
        self._passed = tempfile.TemporaryFile(prefix="dehvf-shard-")  # noqa: SIM115
        self._num_bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        while self._num_bytes < min(offset + size, self._shard.num_bytes):
            chunk = next(self._chunks)
            try:
                self._passed.write(chunk)
                self._passed.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
            self._num_bytes += len(chunk)
        return _pread(self._passed.fileno(), offset, size)

    def close(self) -> None:
        self._chunks.close()
        with contextlib.suppress(OSError):  # of the bytes that could not be written
            self._passed.close()


_OpenShard = _WholeShard | _PassingShard


def _open_directly(location: str, shard: ShardFile) -> _OpenShard:
    return _PassingShard(location, shard) if is_remote(location) else _WholeShard(Path(location) / shard.name)


class _Cache:
    """Copies of shards on a fast local disk, made on first use by one process of a node.

    A copy is named after the shard's hash, which is checked on the way, so data sets and runs may share a
    cache. The least recently used copies are removed first; open ones stay readable. A shard that cannot be
    copied here (a full disk) is read as it would be without a cache.
    """

    def __init__(self, location: str, directory: Path, max_bytes: float):
        self._location = location
        self._directory = directory
        self._max_bytes = max_bytes
        self._has_warned = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise UserError(f"data.cache_dir {directory}: {one_line(error)}") from None

    def open(self, shard: ShardFile) -> _OpenShard:
        path = self._directory / f"{shard.sha256}.tar"
        try:
            with FileLock(self._directory / f".lock-copy-{shard.sha256[:2]}"):
                if not path.is_file():
                    self._copy(shard, path)
                # The time of use, by which copies are removed; under the lock, so that this one is not yet.
                os.utime(path)
                return _WholeShard(path)
        except OSError as error:
            if error.errno is None:  # an error of the source
                raise
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(f"data.cache_dir {self._directory}: {one_line(error)}") from None
            if not self._has_warned:
                self._has_warned = True
                what = f"data.cache_dir {self._directory}: {one_line(error)}; shards are read without a copy"
                with contextlib.suppress(OSError):  # the log may be on the full disk
                    print(f"warning: {what} until that changes", file=sys.stderr, flush=True)
            return _open_directly(self._location, shard)

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
        """Removes the least recently used copies until ``num_bytes`` more fit."""
        found = []
        for path in self._directory.glob("*.tar*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                found.append(((state := path.stat()).st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total + num_bytes <= self._max_bytes:
                return
            if path.suffix == ".tar" or used < time.time() - STALE_S:
                path.unlink(missing_ok=True)
                total -= size


def _chunks(location: str, shard: ShardFile) -> Generator[bytes, None, None]:
    """A shard's bytes in order; it may be closed early. ``OSError`` without a number if not all came."""
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
                num_bytes += len(chunk)
                yield chunk
        if num_bytes < shard.num_bytes:
            raise OSError(f"ended after {num_bytes} of {shard.num_bytes} bytes; copy it again, or try again")
    except OSError as error:
        raise OSError(shown(one_line(error))) from error


def _from_file(path: Path) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        yield from iter(partial(file.read, CHUNK_BYTES), b"")


def _from_command(command: str) -> Generator[bytes, None, None]:
    """The output of a shell command; it is whole only if the command ends with code 0."""
    with tempfile.TemporaryFile(prefix="dehvf-stderr-") as said:
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            yield from iter(partial(process.stdout.read, CHUNK_BYTES), b"")
            if code := process.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise OSError(f"the command ended with code {code}{f': {lines[-1]}' if lines else ''}")
        finally:
            process.terminate()
            process.stdout.close()
            process.wait()


def _from_server(address: str, num_bytes: int) -> Generator[bytes, None, None]:
    """A file of fsspec's, read forward; if it breaks off it is requested again and skipped up to there."""
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
            if not _is_temporary(error) or time.monotonic() - failing_since > RETRY_WITHIN_S:
                raise OSError(_explain(error)) from error
            time.sleep(RETRY_PAUSE_S)


def _open_address(address: str, num_bytes: int) -> Any:
    if not address.startswith(("http://", "https://")):
        filesystem, path = fsspec.url_to_fs(address)
        return filesystem.open(path, "rb", block_size=8 * CHUNK_BYTES)
    from aiohttp import ClientTimeout  # slow to import

    client = {
        "timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S),
        "headers": {"Accept-Encoding": "identity"},
        "read_bufsize": CHUNK_BYTES,
        "trust_env": True,  # proxies, as curl takes them
    }
    # A forked worker would close a session that it shares with its parent.
    filesystem, path = fsspec.url_to_fs(address, client_kwargs=client, skip_instance_cache=True)
    # One request for the whole file, because not all servers know ranges; the size saves another request.
    return filesystem.open(path, "rb", block_size=0, size=num_bytes)


def _is_temporary(error: Exception) -> bool:
    """Whether it may help to try again."""
    from aiohttp import (
        ClientConnectionError,
        ClientConnectorDNSError,
        ClientConnectorError,
        ClientPayloadError,
    )

    if status := getattr(error, "status", None):
        return status in (408, 429) or status >= 500
    # A refused connection, or a certificate, stays as it is; a name server has its moments.
    if isinstance(error, ClientConnectorError) and not isinstance(error, ClientConnectorDNSError):
        return False
    return isinstance(error, TimeoutError | ConnectionError | ClientConnectionError | ClientPayloadError)


def _explain(error: Exception) -> str:
    """An error of a server or the network in one line, with what to do."""
    status = 403 if isinstance(error, PermissionError) else getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file; look at data.location, or copy the shard there"
    if status in (401, 403):
        return (
            f"HTTP {status}: the server refuses it; look at login and permissions, or renew a signed address"
        )
    what = f"HTTP {status}" if status else one_line(error) or type(error).__name__
    return f"{what}; look at data.location, the server and the network, or try again later"


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Reads a range; a network file system may return it in parts."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
