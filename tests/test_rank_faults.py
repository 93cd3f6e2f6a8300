"""Whatever happens on one rank ends all, soon, with one line that names rank and cause."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from processes import Process, free_port, start_rank
from tiny_entries import arguments

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("rank_faults.py")
LIMIT_S = 90
"""For a start, a fault and an end, on a machine that does other things too."""


def errors(outputs: Sequence[str]) -> list[str]:
    """The lines of all ranks that say why the job ended."""
    return [line for text in outputs for line in text.splitlines() if line.startswith("error")]


def ended(processes: Sequence[Process]) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of processes that must end soon."""
    try:
        outputs = [process.communicate(LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def start(fault: str, rank: int, faulty: int, port: int, args: Sequence[str], program: str = "train"):
    return start_rank(SCRIPT, [fault, faulty, program, *args], rank, 2, port)


def run(fault: str, faulty: int, args: Sequence[str], program: str = "train"):
    """Runs two ranks of a program with a fault on one of them."""
    port = free_port()
    return ended([start(fault, rank, faulty, port, args, program) for rank in (0, 1)])


def flags(world: Path, name: str) -> list[str]:
    more = ["--data.val", str(world / "test"), "--train.validate_every", "2", "--data.on_bad", "raise"]
    return arguments(world, f"fault-{name}", *more)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    codes, outputs = run("none", 0, flags(world, "none"))
    assert codes == [0, 0], outputs
    assert errors(outputs) == []
    return world / "runs/fault-none"


def test_large_values_reach_the_other_ranks() -> None:
    codes, outputs = run("none", 0, [], "travel")
    assert codes == [0, 0], outputs


@pytest.mark.parametrize(
    ("fault", "rank", "codes", "message", "traceback"),
    [
        ("mount", 1, [2, 2], "error (rank 1): data.train /mnt/x: no such directory", False),
        ("sample", 1, [2, 2], "error (rank 1): train/000001.tar: sample 7: cut short", False),
        ("worker", 1, [1, 1], "error (rank 1): a process that reads data died (DataLoader worker", False),
        ("memory", 1, [1, 1], "error (rank 1): out of GPU memory: ", False),
        ("bug", 1, [1, 1], "error (rank 1): KeyError: 'no such thing'", True),
        ("bug", 0, [1, 1], "error: KeyError: 'no such thing'", True),
        ("bug where the log's disk is full", 1, [1, 1], "error (rank 1): KeyError: 'no such", False),
        ("saving", 1, [1, 1], "error (rank 1): state: No space left on device", False),
        ("killed", 1, [1, -9], "error: another rank is gone without a message; the launcher", False),
        ("killed", 0, [-9, 1], "error (rank 1): ", False),
    ],
)
def test_one_line_names_rank_and_cause(world, fault, rank, codes, message, traceback) -> None:
    found, outputs = run(fault, rank, flags(world, f"{fault}-{rank}"))
    assert found == codes, outputs
    (line,) = errors(outputs)
    assert line.startswith(message)
    assert fault != "killed" or "gone" in line
    assert ["Traceback" in text for text in outputs] == [traceback and r == rank for r in (0, 1)]


@pytest.mark.parametrize("late", [False, True])
def test_a_mistake_before_the_ranks_are_connected(world, late) -> None:
    wrong = int(not late)
    port = free_port()
    args = [flags(world, "wrong"), ["--config", "nowhere.yaml"]]
    processes = [start("none", 0, 0, port, args[wrong == 0])]
    time.sleep(8 * late)
    processes.append(start("none", 1, 0, port, args[wrong == 1]))
    codes, outputs = ended(processes)
    assert codes == [2, 2], outputs
    (line,) = errors(outputs)
    rank = " (rank 1)" if wrong else ""
    assert line.startswith(f"error{rank}: --config nowhere.yaml: no such file")


@pytest.mark.parametrize(
    ("fault", "code", "lines"),
    [
        ("stopped", 85, []),
        ("answers", 2, ["error (rank 1): rank-00001.jsonl: No space left on device"]),
    ],
)
def test_one_rank_of_an_evaluation_ends_all(world, trained, fault, code, lines) -> None:
    data = ["--data", str(world / "test"), "--tokenizer", "simple", "--batch_size", "1"]
    codes, outputs = run(fault, 1, ["--model", str(trained), *data], "eval")
    assert codes == [code, code], outputs
    assert errors(outputs) == lines
    assert not any("Traceback" in text for text in outputs)


def test_a_second_job_at_the_same_port_is_refused_and_leaves_the_first_alone(world) -> None:
    port = free_port()
    # Long enough to be there still when the last of the others comes.
    first, second = [*flags(world, "first"), "--train.steps", "120"], flags(world, "second")
    processes = [start("none", 0, 0, port, first)]
    # The second job's ranks find a store at the port, before and after it is complete.
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    processes += [start("none", 0, 0, port, second), start("none", 1, 0, port, first)]
    metrics = world / "runs/fault-first/metrics.jsonl"
    for _ in range(600):
        if metrics.is_file():
            break
        time.sleep(0.1)
    processes.append(start("none", 1, 0, port, second))
    codes, outputs = ended(processes)
    assert codes == [0, 2, 0, 2], outputs
    found = errors(outputs)
    assert all("where the ranks meet, is" in line and "--master_port" in line for line in found)
    assert 1 <= len(found) <= 2
