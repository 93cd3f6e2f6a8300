"""Python and the packages that pyproject.toml asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
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


def parse_requirement(requirement: str) -> tuple[str, str]:
    """Name and smallest version of ``name[extras]>=version``, the one form that we use.

    Not by the ``packaging`` library, which may be what is missing.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)", requirement.strip())
    if match is None:
        raise ValueError(f"the requirement {requirement!r} is not of the form name>=version")
    return match[1], match[2]


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
        name, minimum = parse_requirement(requirement)
        remedy = f"pip install '{requirement}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line("FAIL", name, f"not installed; needs >= {minimum}", remedy))
            continue
        if version_key(found) < version_key(minimum):
            lines.append(Line("FAIL", name, f"{found}; needs >= {minimum}", remedy))
        else:
            lines.append(Line("ok", name, found))
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
