"""Files and directories that are complete under their name or absent, also after a power cut."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; its file replaces ``path`` when the block ends without an error."""
    part = part_of(path)
    try:
        yield part
        flush_to_disk(part)
        part.replace(path)
        flush_to_disk(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory; it replaces ``path`` when the block ends without an error."""
    part, old = part_of(path), part_of(path.with_name(path.name + ".old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for written in (*part.rglob("*"), part):
            flush_to_disk(written)
        if path.exists():
            path.rename(old)
        part.rename(path)
        flush_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def part_of(path: Path) -> Path:
    """Where a file or directory is while it is written: hidden, beside its final name."""
    return path.with_name(f".{path.name}.part")


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """A file's hash, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
