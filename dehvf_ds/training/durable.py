"""Files that outlive a crash: flushed to the disk, named when they are whole, known by size and hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_pointer(path: Path, name: str) -> None:
    """Writes a file that holds one name, so that it always holds a whole one."""
    part = path.with_name(f".{path.name}.part-pointer")
    part.write_text(name + "\n", encoding="utf-8")
    flush_to_disk(part)
    part.rename(path)
    flush_to_disk(path.parent)


def read_pointer(path: Path) -> str | None:
    """The name in a pointer file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_hash(path: Path) -> dict[str, Any]:
    """A file's ``bytes`` and ``sha256``."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
