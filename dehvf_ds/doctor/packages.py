"""Python and the packages that pyproject.toml asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dehvf_ds.doctor.report import Line

DISTRIBUTION = "dehvf_ds"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
MIN_PYTHON = (3, 11)
IMPORT_TIMEOUT_S = 120


def check_python() -> Line:
    """The interpreter's version."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < MIN_PYTHON:
        return Line("FAIL", "Python", found, f"use Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Line("ok", "Python", found)


def read_requirements() -> list[str]:
    """Our requirements: those of the checkout, or of the installed package where there is none."""
    if PYPROJECT.is_file():
        import tomllib

        return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    given = importlib.metadata.requires(DISTRIBUTION) or []
    return [requirement for requirement in given if "extra ==" not in requirement]


@dataclass(frozen=True)
class Requirement:
    """A package and the versions of it that we run with.

    Attributes:
        name: of the package.
        minimum: the smallest version.
        limit: the smallest one that is too new; empty where none is.
    """

    name: str
    minimum: str
    limit: str = ""

    def is_met_by(self, version: str) -> bool:
        """Whether we run with this version."""
        key = version_key(version)
        return version_key(self.minimum) <= key and (not self.limit or key < version_key(self.limit))

    def __str__(self) -> str:
        return f">= {self.minimum}" + (f", < {self.limit}" if self.limit else "")


def parse_requirement(requirement: str) -> Requirement:
    """Reads ``name[extras]>=version`` or ``name[extras]>=version,<version``, the forms that we use.

    Not by the ``packaging`` library, which may be what is missing.

    Raises:
        ValueError: another form.
    """
    # Metadata of an installed package has the two bounds in either order.
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([<>=0-9., ]+)", requirement.strip())
    bounds = dict(re.findall(r"(>=|<)\s*([0-9.]+)(?:,|$)", match[2])) if match else {}
    if match is None or ">=" not in bounds or len(bounds) != match[2].count(",") + 1:
        raise ValueError(f"the requirement {requirement!r} is not of the form name>=version[,<version]")
    return Requirement(match[1], bounds[">="], bounds.get("<", ""))


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, trailing zeros left out: ``2.6.0+cu124`` is (2, 6)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_packages() -> list[Line]:
    """Every package that pyproject.toml asks for, by what is installed; nothing is imported."""
    lines = []
    for requirement in read_requirements():
        needed = parse_requirement(requirement)
        remedy = f"pip install '{requirement}'"
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line("FAIL", needed.name, f"not installed; needs {needed}", remedy))
            continue
        if needed.is_met_by(found):
            lines.append(Line("ok", needed.name, found))
        else:
            lines.append(Line("FAIL", needed.name, f"{found}; needs {needed}", remedy))
    return lines


def check_deepspeed_import() -> Line:
    """Whether DeepSpeed imports; in a process of its own, since what it loads may end the process."""
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return Line("FAIL", "deepspeed import", "not installed", "see the line deepspeed above")
    result = subprocess.run(
        [sys.executable, "-c", "import deepspeed"],
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_S,
        check=False,
    )
    if result.returncode == 0:
        return Line("ok", "deepspeed import", "works")
    last = ["", *result.stderr.strip().splitlines()][-1]
    found = last or f"ended with code {result.returncode}"
    return Line("FAIL", "deepspeed import", found, "python -c 'import deepspeed' shows the whole error")
