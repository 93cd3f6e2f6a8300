"""Whatever happens on one rank ends all, soon, with one line that names rank and cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import USER_ENVIRONMENT
from tiny_entries import build_world

pytestmark = pytest.mark.long

EXPECTED = {
    "configuration": (2, "error (rank 1): --config run.yaml: no such file"),
    "mount": (2, "error (rank 1): data.train /mnt/x: no such directory"),
    "loading": (2, "error (rank 1): model.safetensors: cut short"),
    "sample": (2, "error (rank 1): train/000001.tar: sample 7: cut short"),
    "worker": (1, "error (rank 1): a process that reads data died (DataLoader worker (pid(s) "),
    "memory": (1, "error (rank 1): out of GPU memory: "),
    "bug": (1, "error (rank 1): KeyError: 'no such thing'"),
    "validation": (1, "error (rank 1): val/0.tar: Input/output error"),
    "saving": (1, "error (rank 1): state: No space left on device"),
    "answers": (2, "error (rank 1): rank-00001.jsonl: No space left on device"),
    "bug of rank 0": (1, "error: KeyError: 'no such thing'"),
    "bug where the log's disk is full": (1, "error (rank 1): KeyError: 'no such thing'"),
    "configuration before the other begins": (2, "error: --config run.yaml: no such file"),
}
LIMIT_S = 60


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("faults")
    world = build_world(root)
    results = root / "results.json"
    script = Path(__file__).with_name("rank_faults.py")
    subprocess.run([sys.executable, script, world, results], env=USER_ENVIRONMENT, check=True, timeout=900)
    return json.loads(results.read_text())


def errors(outcome: dict[str, Any]) -> list[str]:
    """The lines of both ranks that say why the job ended."""
    return [line for text in outcome["outputs"] for line in text.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("fault", ["none", "large values"])
def test_without_a_fault_both_finish(found: dict[str, Any], fault: str) -> None:
    assert found[fault]["codes"] == [0, 0], found[fault]["outputs"]
    assert errors(found[fault]) == []


@pytest.mark.parametrize("fault", EXPECTED)
def test_one_line_names_rank_and_cause(found: dict[str, Any], fault: str) -> None:
    outcome = found[fault]
    code, line = EXPECTED[fault]
    assert outcome["codes"] == [code, code], outcome["outputs"]
    assert outcome["seconds"] < LIMIT_S
    (told,) = errors(outcome)
    assert told.startswith(line)


def test_the_traceback_of_a_bug_is_that_of_its_rank(found: dict[str, Any]) -> None:
    assert ["Traceback" in text for text in found["bug"]["outputs"]] == [False, True]
    assert ["Traceback" in text for text in found["memory"]["outputs"]] == [False, False]


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        (
            "killed",
            [1, -9],
            "error: another rank is gone without a word, killed perhaps; the launcher may know",
        ),
        ("rank 0 killed", [-9, 1], "error (rank 1): "),
    ],
)
def test_a_rank_that_is_killed_ends_the_other(
    found: dict[str, Any], fault: str, codes: list[int], told: str
) -> None:
    outcome = found[fault]
    assert outcome["codes"] == codes, outcome["outputs"]
    assert outcome["seconds"] < LIMIT_S
    (line,) = errors(outcome)
    assert line.startswith(told)
    assert "gone" in line


@pytest.mark.parametrize("fault", ["stopped while it answers", "stopped twice"])
def test_a_signal_to_one_rank_of_an_evaluation_stops_all_to_be_started_again(
    found: dict[str, Any], fault: str
) -> None:
    outcome = found[fault]
    assert outcome["codes"] == [85, 85], outcome["outputs"]
    assert errors(outcome) == []
    assert not any("Traceback" in text for text in outcome["outputs"])


def test_a_second_job_at_the_same_port_is_told_so_and_leaves_the_first_alone(found: dict[str, Any]) -> None:
    outcome = found["two jobs"]
    assert outcome["codes"] == [0, 2, 0, 2], outcome["outputs"]
    told = errors(outcome)
    assert all("where the ranks meet, is" in line and "--master_port" in line for line in told)
    assert 1 <= len(told) <= 2
