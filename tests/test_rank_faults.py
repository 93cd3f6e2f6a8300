"""Whatever happens on one rank ends all, soon, with one line that names rank and cause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_entries import build_world
from training.launch import USER_ENVIRONMENT

EXPECTED = {
    "configuration": (2, "error (rank 1): --config run.yaml: no such file"),
    "mount": (2, "error (rank 1): data.train /mnt/x: no such directory"),
    "loading": (2, "error (rank 1): model.safetensors: cut short"),
    "sample": (2, "error (rank 1): train/000001.tar: sample 7: cut short"),
    "worker": (1, "error (rank 1): RuntimeError: DataLoader worker"),
    "memory": (1, "error (rank 1): out of GPU memory: "),
    "bug": (1, "error (rank 1): KeyError: 'no such thing'"),
    "validation": (1, "error (rank 1): val/0.tar: Input/output error"),
    "saving": (1, "error (rank 1): state: No space left on device"),
    "answers": (2, "error (rank 1): rank-00001.jsonl: No space left on device"),
    "bug of rank 0": (1, "error: KeyError: 'no such thing'"),
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


def test_without_a_fault_both_finish(found: dict[str, Any]) -> None:
    assert found["whole"]["codes"] == [0, 0], found["whole"]["outputs"]
    assert errors(found["whole"]) == []


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


def test_a_rank_that_is_killed_ends_the_other(found: dict[str, Any]) -> None:
    outcome = found["killed"]
    assert outcome["codes"] == [1, -9], outcome["outputs"]
    assert outcome["seconds"] < LIMIT_S
    assert errors(outcome) == [
        "error: another rank is gone without a word, killed perhaps; the launcher may know"
    ]
