"""Where a shard's bytes come from: files, a local cache of them, or a stream that can only be read forward.

All three give any byte range of any shard, so the order of the samples is the same wherever the shards lie.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import DamagedSample, one_line
from dehvf_ds.data.fetch import CHUNK_BYTES, Stream, is_remote, open_stream, shown

MAX_OPEN_SHARDS = 64
# Copies of different shards share these locks, so that the cache holds no lock file for each shard.
NUM_LOCKS = 64
# A copy takes minutes at most; what is older was left by a killed process.
STALE_S = 3600.0


@dataclass(frozen=True)
class ShardFile:
    """A shard as the manifest names it: file name, size in bytes, hash."""

    name: str
    num_bytes: int
    sha256: str


class Storage(Protocol):
    """Byte ranges of shards, by the shard's number."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Reads a range; fewer bytes at the shard's end. Raises ``DamagedSample`` if it cannot be read."""
        ...

    def close(self) -> None:
        """Lets go of what reads have opened; a later read opens it again."""
        ...


def build_storage(
    shards: Sequence[ShardFile], location: str, *, cache_dir: str | None, cache_bytes: float
) -> Storage:
    """Chooses how shards are read.

    Args:
        shards: the shards, in the manifest's order.
        location: a directory, an ``http(s)://`` address, or a ``pipe:`` command with ``{}`` for the name.
        cache_dir: local directory to copy shards to, one copy a node; None reads them where they lie.
        cache_bytes: largest size of the cache.

    Raises:
        UserError: the cache cannot hold the largest shard, or the command has no place for the name.
    """
    if location.startswith("pipe:") and "{}" not in location:
        raise UserError(f"data.location {location}: needs {{}} where the shard's name goes")
    if cache_dir is not None:
        largest = max(shards, key=lambda shard: shard.num_bytes)
        if largest.num_bytes > cache_bytes:
            raise UserError(
                f"data.cache_gb {cache_bytes / 1e9:g}: less than the largest shard, {largest.name} "
                f"({largest.num_bytes / 1e9:.3g} GB)"
            )
        return CachedShards(shards, location, Path(cache_dir), cache_bytes)
    if is_remote(location):
        return StreamedShards(shards, location)
    return LocalShards([Path(location) / shard.name for shard in shards])


class LocalShards:
    """Files read at random with ``pread``; the last ``MAX_OPEN_SHARDS`` stay open.

    Opening a file for each read would load a parallel file system's metadata server. Forked workers may share
    the descriptors, for reads keep no position.
    """

    def __init__(self, paths: Sequence[Path]):
        """Keeps the paths, by the shards' numbers."""
        self._open_files: OrderedDict[int, int] = OrderedDict()
        self._paths = paths

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See ``Storage``."""
        try:
            if shard not in self._open_files:
                while len(self._open_files) >= MAX_OPEN_SHARDS:
                    os.close(self._open_files.popitem(last=False)[1])
                self._open_files[shard] = self._open(shard)
            self._open_files.move_to_end(shard)
            return _pread(self._open_files[shard], offset, size)
        except OSError as error:
            raise DamagedSample(f"{self._paths[shard]}: cannot be read: {one_line(error)}") from error

    def close(self) -> None:
        """See ``Storage``."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _open(self, shard: int) -> int:
        return os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)


class CachedShards(LocalShards):
    """Copies of shards on a fast local disk, made when first asked for, one copier a node.

    A copy is named after the shard's hash, which is checked on the way, so several data sets and runs may
    share a cache. The longest unused copies leave first; a process that still reads one keeps it until then.
    """

    def __init__(self, shards: Sequence[ShardFile], location: str, directory: Path, max_bytes: float):
        """Makes the cache directory.

        Raises:
            UserError: it cannot be made.
        """
        super().__init__([directory / f"{shard.sha256}.tar" for shard in shards])
        self._shards = shards
        self._location = location
        self._directory = directory
        self._max_bytes = max_bytes
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {directory}: {one_line(error)}") from None

    def _open(self, shard: int) -> int:
        path = self._paths[shard]
        with self._lock(f"copy-{int(self._shards[shard].sha256[:8], 16) % NUM_LOCKS:02d}"):
            if not path.is_file():
                self._copy(self._shards[shard], path)
            # The time of use, for who leaves first; under the lock, so that the file is not evicted unread.
            os.utime(path)
            return super()._open(shard)

    def _copy(self, shard: ShardFile, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            with self._lock("room"):
                self._make_room(shard.num_bytes)
                with part.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shard.num_bytes)
            digest = hashlib.sha256()
            with part.open("r+b") as file, open_stream(self._location, shard.name, steady=True) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                num_bytes = file.tell()
                file.truncate()
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise UserError(f"data.cache_dir {self._directory}: {one_line(error)}") from None
            raise
        if num_bytes < shard.num_bytes:
            part.unlink()
            raise DamagedSample(f"{shown(self._location)}: {shard.name}: {_ended_early(num_bytes, shard)}")
        if digest.hexdigest() != shard.sha256:
            part.unlink()
            raise DamagedSample(
                f"{shown(self._location)}: {shard.name}: its bytes do not have the manifest's sha256; copy "
                "it again"
            )
        part.rename(path)

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

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Holds a lock among this node's processes; it ends with its holder, however that ends."""
        with (self._directory / f".lock-{name}").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class StreamedShards:
    """Shards read from their beginning, once each time they are opened, through a command or the network.

    What has passed lies in an unnamed temporary file until the shard is left: the rows of a shuffle window
    are asked for out of order, and a row once for each of its captions. Each loader worker reads for itself;
    with several of them a ``cache_dir`` saves the others' traffic. Resuming within a shard reads it up to
    there. Up to ``MAX_OPEN_SHARDS`` shards a worker lie in the temporary directory (``TMPDIR``).
    """

    def __init__(self, shards: Sequence[ShardFile], location: str):
        """Keeps the names and where they lie."""
        self._shards = shards
        self._location = location
        self._open_streams: OrderedDict[int, _Stream] = OrderedDict()
        self._owner = os.getpid()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See ``Storage``."""
        if self._owner != os.getpid():
            # A forked worker: the parent's streams have a position that is not ours.
            self._open_streams, self._owner = OrderedDict(), os.getpid()
        try:
            if shard not in self._open_streams:
                while len(self._open_streams) >= MAX_OPEN_SHARDS:
                    self._open_streams.popitem(last=False)[1].close()
                self._open_streams[shard] = _Stream(self._location, self._shards[shard])
            self._open_streams.move_to_end(shard)
            return self._open_streams[shard].read(offset, size)
        except OSError as error:
            if stream := self._open_streams.pop(shard, None):
                stream.close()
            name = self._shards[shard].name
            raise DamagedSample(f"{name}: cannot be read: {one_line(error)}") from error

    def close(self) -> None:
        """See ``Storage``."""
        while self._open_streams and self._owner == os.getpid():
            self._open_streams.popitem()[1].close()


class _Stream:
    """A forward stream and what has passed of it."""

    def __init__(self, location: str, shard: ShardFile):
        self._shard = shard
        self._leave = contextlib.ExitStack()
        passed = tempfile.TemporaryFile(prefix="dehvf-shard-")  # noqa: SIM115
        self._passed = self._leave.enter_context(passed)
        self._stream: Stream = self._leave.enter_context(open_stream(location, shard.name))
        self._num_bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        while self._num_bytes < offset + size and (chunk := self._stream.read(CHUNK_BYTES)):
            self._passed.write(chunk)
            self._num_bytes += len(chunk)
        if self._num_bytes < min(offset + size, self._shard.num_bytes):
            raise OSError(_ended_early(self._num_bytes, self._shard))
        self._passed.flush()
        return _pread(self._passed.fileno(), offset, size)

    def close(self) -> None:
        self._leave.close()


def _ended_early(num_bytes: int, shard: ShardFile) -> str:
    return f"ended after {num_bytes} of {shard.num_bytes} bytes; copy it again, or try again"


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Reads a range; a network file system may give it in pieces."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
