from __future__ import annotations

import pytest
from training.planning.sizes import full_shapes

from dehvf_ds.training.planning.shapes import Shapes, Work


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return full_shapes("13B")


@pytest.fixture
def work() -> Work:
    return Work(rows=16, tokens=64, supervised=16 * 63, element_bytes=2)
