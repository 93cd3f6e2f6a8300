"""Environments that lack a package, or hold an old one."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dehvf_ds.doctor import packages


def test_the_smallest_python_is_that_of_the_project() -> None:
    assert (
        f'requires-python = ">={packages.MIN_PYTHON[0]}.{packages.MIN_PYTHON[1]}"'
        in packages.PYPROJECT.read_text()
    )
    assert packages.check_python().level == "ok"


def test_an_old_python_fails(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert packages.check_python().level == "FAIL"
    assert "3.11" in packages.check_python().remedy


def test_requirements_are_understood_from_the_checkout_and_from_the_installed_package(monkeypatch) -> None:
    parsed = map(packages.parse_requirement, packages.read_requirements())
    from_checkout = {needed.name: needed for needed in parsed}
    assert str(from_checkout["pyyaml"]) == ">= 6"
    assert str(from_checkout["transformers"]) == ">= 5.0, < 6"
    given = ["torch>=2.6", "hydra[all]>=1.3", 'ruff>=0.9; extra == "dev"']
    monkeypatch.setattr(packages, "PYPROJECT", Path("/nowhere/pyproject.toml"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: given)
    assert packages.read_requirements() == given[:2]
    assert packages.parse_requirement("deepspeed<0.20,>=0.19.3") == packages.Requirement(
        "deepspeed", "0.19.3", "0.20"
    )
    for unlike in ("torch==2", "torch", "torch<3", "torch>=2,<=3", "torch>=2,!=2.1", "torch~=2.1"):
        with pytest.raises(ValueError, match=re.escape(unlike)):
            packages.parse_requirement(unlike)


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [("0.19.2", "0.19.3"), ("2.6", "2.13.0+cpu"), ("9.9", "10"), ("0.9.1rc1", "0.10"), ("2.6.0", "2.6.1")],
)
def test_versions_are_compared_by_number(smaller: str, larger: str) -> None:
    assert packages.version_key(smaller) < packages.version_key(larger)


def test_equal_versions_may_be_written_shorter() -> None:
    assert packages.version_key("10") == packages.version_key("10.0.0+cu124")


def test_an_old_package_and_a_missing_one_fail_with_the_command(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"deepspeed": "0.18.0", "transformers": "6.0.0.dev1"}.get(name, "99")

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = {line.what: line for line in packages.check_packages()}
    failing = {what for what, line in lines.items() if line.level == "FAIL"}
    assert failing == {"deepspeed", "peft", "transformers"}
    assert lines["deepspeed"].found.startswith("0.18.0; needs >= ")
    assert lines["transformers"].found == "6.0.0.dev1; needs >= 5.0, < 6"
    assert lines["peft"].found.startswith("not installed")
    assert lines["peft"].remedy.startswith("pip install 'peft>=")


def test_deepspeed_is_not_started_where_it_is_missing(monkeypatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started"))
    assert packages.check_deepspeed_import().level == "FAIL"


@pytest.mark.parametrize(
    ("code", "stderr", "found"),
    [(1, "Traceback\nImportError: no nvcc\n", "ImportError: no nvcc"), (-11, "", "ended with code -11")],
)
def test_a_deepspeed_that_does_not_import_fails(monkeypatch, code: int, stderr: str, found: str) -> None:
    result = SimpleNamespace(returncode=code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    line = packages.check_deepspeed_import()
    assert (line.level, line.found) == ("FAIL", found)
