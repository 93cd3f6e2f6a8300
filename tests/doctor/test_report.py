"""The report: its lines, its exit code, and that it comes in any environment."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import REPOSITORY

from dehvf_ds.doctor import __main__ as entry
from dehvf_ds.doctor import packages
from dehvf_ds.doctor.report import Check, Line, format_line, run_check


def test_columns_are_aligned_and_the_remedy_comes_last() -> None:
    lines = [format_line(Line("ok", "Python", "3.11")), format_line(Line("FAIL", "Java", "none", "get it"))]
    assert lines[0] == "ok    Python              3.11"
    assert lines[1].startswith("FAIL  Java                none ")
    assert lines[1].endswith("  get it")


@pytest.mark.parametrize(
    ("error", "found"),
    [(ValueError("a\nb"), "ValueError: a b"), (SystemExit(3), "SystemExit: 3"), (OSError("x"), "OSError: x")],
)
def test_a_check_that_breaks_is_one_failing_line(error: BaseException, found: str) -> None:
    def look() -> Line:
        raise error

    (line,) = run_check(Check("thing", look))
    assert (line.level, line.what, line.found) == ("FAIL", "thing", found)
    assert line.remedy


def test_wrong_flags_are_one_line_and_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        entry.main(["--confg", "demo"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --confg demo\n"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_the_exit_code_says_whether_anything_fails(monkeypatch, capsys, level, code: int) -> None:
    checks = [Check("a", lambda: Line("ok", "a", "x")), Check("b", lambda: Line(level, "b", "y", "z"))]
    monkeypatch.setattr(entry, "environment_checks", lambda: iter(checks))
    assert entry.main([]) == code
    assert capsys.readouterr().out.splitlines()[1].startswith(level)


def test_every_environment_check_reports(monkeypatch, capsys) -> None:
    monkeypatch.setattr(packages, "check_deepspeed_import", lambda: Line("ok", "deepspeed import", "works"))
    entry.main([])
    whats = [line[6:24].strip() for line in capsys.readouterr().out.splitlines()]
    assert whats[0] == "Python"
    assert {"torch", "deepspeed", "torch build", "NCCL", "bf16", "Java", "shared memory"} <= set(whats)


def test_a_bare_interpreter_gets_its_report_too() -> None:
    """No package of ours, torch included: an isolated interpreter without site-packages."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(REPOSITORY / "dehvf_ds/doctor"), "--config", "demo"],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert sum(line.startswith("FAIL  torch ") and "pip install 'torch>=" in line for line in lines) == 1
    assert any(line.startswith("FAIL  recipe") for line in lines)
    assert any("shared memory" in line for line in lines)


@pytest.mark.slow
def test_this_environment_has_no_failing_package() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dehvf_ds.doctor"],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    failing = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    # The machine's own lacks are its own; the environment is the Makefile's.
    assert not [line for line in failing if "pip install" in line], failing
    assert "deepspeed import    works" in result.stdout
