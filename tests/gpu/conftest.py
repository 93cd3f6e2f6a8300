"""The tests of a GPU: each runs on ``cuda`` where there is one, and on ``cpu`` as a rehearsal of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu.runs import Runs
from processes import HAS_GPU

FACTS: list[str] = []
"""What the tests measured, printed at the end: a bound that holds tells little of by how much."""

_started: dict[str, Runs] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    # Libraries warn of this or that build of CUDA; it is no defect of ours.
    item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_terminal_summary(terminalreporter) -> None:
    if FACTS:
        terminalreporter.section("measured")
        for fact in FACTS:
            terminalreporter.write_line(fact)


@pytest.fixture(scope="session", params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    if name == "cuda" and not torch.cuda.is_available():
        # A GPU that torch does not see is no reason to skip where these tests alone were asked for.
        assert not (HAS_GPU and os.environ.get("CUDA_VISIBLE_DEVICES") is None), "torch does not see the GPU"
        pytest.skip("no CUDA device")
    if name == "cuda" and any("runs" in getattr(item, "fixturenames", ()) for item in request.session.items):
        # Started before the first test of any file: they train while the others compute.
        with Runs(name, request.getfixturevalue("world")) as _started[name]:
            yield name
    else:
        yield name


@pytest.fixture
def fact(request: pytest.FixtureRequest):
    """Notes a measured number, for the end of the report."""
    return lambda text: FACTS.append(f"{request.node.name}: {text}")


@pytest.fixture(scope="session")
def runs(device: str, world: Path) -> Iterator[Runs]:
    """Runs of ``train.py`` in processes of their own; on a GPU all are started at once."""
    if device in _started:
        yield _started[device]
    else:
        with Runs(device, world) as started:
            yield started
