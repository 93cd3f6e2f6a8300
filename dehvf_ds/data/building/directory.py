"""A directory that shards are written to: one writer at a time, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dehvf_ds.config import UserError
from dehvf_ds.data.damage import one_line
from dehvf_ds.data.manifest import MANIFEST_NAME, read_manifest
from dehvf_ds.data.shards import publish, temporary_name

PLAN_NAME = ".build.json"
"""Arguments of a build that is not finished; the manifest takes them over."""


class Progress(Protocol):
    """Is told how much there is to do and how much of it is done."""

    def start(self, total: int) -> None:
        """Begins; ``total`` is what the counts of ``advance`` add up to."""
        ...

    def advance(self, count: int) -> None:
        """``count`` more are done."""
        ...


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keeps a second writer out of a directory as long as this one lives."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another call is writing here; wait for it") from None
        except OSError:
            # A file system without locks.
            pass
        yield
    finally:
        os.close(descriptor)


def is_part(path: Path) -> bool:
    """Whether a file is one that was being written."""
    return path.name.startswith(".") and path.name.endswith(".part")


def remove_parts(output: Path) -> None:
    """Removes half-written files."""
    for path in output.iterdir():
        if is_part(path):
            with contextlib.suppress(OSError):
                path.unlink()


def remove_leftovers(output: Path) -> None:
    """Removes what a finished build needs no more."""
    remove_parts(output)
    (output / PLAN_NAME).unlink(missing_ok=True)


def write_error(error: OSError, path: Path) -> UserError:
    """One line of what the disk said."""
    reason = error.strerror or one_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path}: {reason}; make room and call again, finished shards are kept")
    return UserError(f"{error.filename or path}: {reason}")


def finished_manifest(output: Path, builder: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a build of these arguments that is finished; None if there is none.

    Raises:
        UserError: the directory holds shards of something else.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(output)
    except UserError:
        raise UserError(f"{output}: not empty; give another --output") from None
    _check_same(output, manifest.get("builder"), builder, "holds shards")
    return manifest


def check_begun(output: Path, builder: dict[str, Any]) -> None:
    """Refuses a directory that holds something else than an unfinished build of these arguments."""
    path = output / PLAN_NAME
    if path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            begun = None
        _check_same(output, begun, builder, "holds a build that is not finished")
    elif any(not is_part(path) for path in output.iterdir()):
        raise UserError(f"{output}: not empty; give another --output")


def _check_same(output: Path, before: Any, now: dict[str, Any], what: str) -> None:
    if not isinstance(before, dict) or before.get("source") != now["source"] or "version" not in before:
        raise UserError(f"{output}: not empty; give another --output")
    names = [name for name in {**now, **before} if not name.startswith("left_out")]
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing:
        listed = ", ".join(
            f"{name} ({_shown(before.get(name))} there, {_shown(now.get(name))} now)" for name in differing
        )
        raise UserError(f"{output}: {what} of other arguments: {listed}; give another --output, or remove it")


def _shown(value: Any) -> str:
    return f"{value['name']} {value['sha256'][:12]}" if isinstance(value, dict) else str(value)


def begin(output: Path, builder: dict[str, Any]) -> None:
    """Writes down the arguments of the build, for the call that may have to finish it."""
    remove_parts(output)
    path = output / PLAN_NAME
    temporary_name(path).write_text(json.dumps(builder, indent=2) + "\n", encoding="utf-8")
    publish(path)
