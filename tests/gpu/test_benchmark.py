"""benchmarks/gpu.py from end to end, at tiny sizes on the CPU: the script is not what fails on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY


@pytest.mark.long
def test_every_part_of_the_benchmark_is_rehearsed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/gpu.py"), "--output", str(tmp_path), "--rehearse"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert not [r for r in results if "failed" in r or "left out" in r]
    steps = [r for r in results if "step_s" in r]
    assert len(steps) == 2 * (4 + 2)  # two lengths; four models of plain torch, two stages
    assert all(0 < r["text_tokens"] < r["rows"] * r["tokens"] for r in steps)
    assert [r["planned_bytes"] > 0 for r in steps if "zero" in r["part"]] == [True] * 4
    # Rows above eight are refused there, as a device refuses what does not fit.
    assert [(r["rows"], r["failed_rows"]) for r in results if "failed_rows" in r] == [(8, 12)] * 5
    assert sum("bare_tokens_per_s" in r for r in results) == 2 * 2  # two batches; plainly and compiled
    assert sum("kernels" in r for r in results) == 1
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {r['part']} |" in table for r in steps)
    assert (tmp_path / "profile.txt").stat().st_size > 1000
