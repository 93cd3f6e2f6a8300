"""benchmarks/gpu.py from end to end, at tiny sizes on the CPU: the script is not what fails on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, is_of_the_gpu


def test_where_a_gpu_is_its_own_tests_alone_see_it() -> None:
    for shown in (["-rs", "tests/gpu", "-k", "cuda"], ["/a/tests/gpu/test_runs.py::test_x[cuda]"]):
        assert is_of_the_gpu(shown)
    for hidden in ([], ["-q"], ["tests"], ["tests/gpu", "tests/test_plan.py"], ["-n", "2", "-m", "not long"]):
        assert not is_of_the_gpu(hidden)


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
    # Two lengths; of plain torch four models, two of them compiled too; two stages, compiled too; LLaVA.
    assert len(steps) == 2 * (4 + 2 + 2 * 2 + 1)
    assert all(r["text_tokens"] == r["rows"] * r["tokens"] for r in steps)
    assert [r["planned_bytes"] > 0 for r in steps if "zero" in r["part"]] == [True] * 8
    # Rows above eight are refused there, as a device refuses what does not fit.
    assert [(r["rows"], r["failed_rows"]) for r in results if "failed_rows" in r] == [(8, 12)] * 6
    assert sum("bare_tokens_per_s" in r for r in results) == 2 * 2  # two batches; plainly and compiled
    assert sum("kernels" in r for r in results) == 2
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {r['part']} |" in table for r in steps)
    assert (tmp_path / "profile.txt").stat().st_size > 1000


@pytest.mark.long
def test_peers_are_set_beside_ours(tmp_path: Path) -> None:
    """Without checkouts of MemVP and ADEM-VL, which are left out by name; LLaVA costs more than `ffn`."""
    command = [sys.executable, str(REPOSITORY / "benchmarks/peers.py"), "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    head, rows = lines[0], {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]}
    assert list(rows) == ["ffn", "prefix", "LLaVA, PEFT, Trainer"]
    saved = [float(rows[name]["saved MiB"].split()[0]) for name in rows]
    assert saved == sorted(saved)
    assert saved[2] > 2 * saved[0]
    assert float(rows["ffn"]["samples/s"]) > 0
    assert float(rows["prefix"]["decoding tokens/s"]) > 0
    assert len(head) == 12
    assert all(f"{name}: left out" in done.stdout for name in ("MemVP", "ADEM-VL"))
