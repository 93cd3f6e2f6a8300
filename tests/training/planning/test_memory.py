from __future__ import annotations

import pytest
from training.planning.sizes import ZERO, full_shapes

from dehvf_ds.training.planning.memory import (
    GIB,
    bucket_bytes,
    checkpoint_bytes,
    host_load_bytes,
    parameter_bytes,
)
from dehvf_ds.training.planning.shapes import Shapes
from dehvf_ds.training.planning.zero import STRATEGIES, Zero


def test_counts_of_7b() -> None:
    shapes = full_shapes("7B")
    assert (shapes.language, shapes.tower, shapes.trainable) == (6_738_415_616, 303_179_776, 5_156_224)


def test_counts_of_13b(shapes: Shapes) -> None:
    assert (shapes.language, shapes.tower, shapes.trainable) == (13_015_864_320, 303_179_776, 4_585_088)
    assert shapes.lora == 40 * 4 * (13824 + 5120)
    assert (shapes.slots, shapes.levels, shapes.largest) == (257, 6, 32000 * 5120)


def test_zero3_shares_a_frozen_13b_over_8_gpus_in_some_3_gib(shapes: Shapes) -> None:
    assert parameter_bytes(shapes.frozen, shapes.persistent, "ZeRO-3", 1, 8, 2) / GIB == pytest.approx(
        3.1, abs=0.05
    )


def test_where_the_frozen_weights_lie(shapes: Shapes) -> None:
    whole = shapes.frozen * 2
    held = {s: parameter_bytes(shapes.frozen, shapes.persistent, s, 2, 8, 2) for s in STRATEGIES}
    persistent = shapes.persistent * 2
    assert held["ZeRO-2"] == whole
    assert held["ZeRO-3"] == pytest.approx(whole / 16 + persistent, rel=1e-6)
    assert held["ZeRO-3 + hpZ"] == pytest.approx(whole / 16 + whole / 8 + persistent, rel=1e-6)
    assert held["ZeRO-3 + offload"] == pytest.approx(persistent * 17 / 16, rel=1e-6)
    assert host_load_bytes(shapes, "ZeRO-3", 2) == whole
    assert host_load_bytes(shapes, "ZeRO-2", 2) == 0


def test_buckets_are_allocated_whole_and_twice_in_zero2() -> None:
    assert bucket_bytes(ZERO, "ZeRO-3", 2) == 40_000_000
    assert bucket_bytes(ZERO, "ZeRO-2", 2) == 80_000_000
    assert bucket_bytes(Zero(), "ZeRO-3", 2) == 1_000_000_000


def test_sizes_are_read_from_the_json_and_are_deepspeeds_elsewhere() -> None:
    given = {
        "stage": 3,
        "reduce_bucket_size": 2e7,
        "stage3_max_live_parameters": "auto",
        "overlap_comm": False,
    }
    assert Zero.from_json({"zero_optimization": given}) == Zero(reduce_bucket=20_000_000, overlap=False)
    assert Zero.from_json({}) == Zero()


def test_a_checkpoint_of_13b_is_below_100_mb(shapes: Shapes) -> None:
    assert checkpoint_bytes(shapes) == 16 * 4_585_088 < 100e6
