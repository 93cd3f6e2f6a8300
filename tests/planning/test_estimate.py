"""What is known of ZeRO in closed form, on LLaMA-13B with CLIP ViT-L/14."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import LORA

from dehvf_ds.model import DehvfConfig
from dehvf_ds.planning import memory
from dehvf_ds.planning.estimate import Estimate, PlanConfig, choose, estimate, gathered_elements
from dehvf_ds.planning.memory import (
    JSON_NAMES,
    MicroStep,
    Parameters,
    Sharding,
    Strategy,
    resting_bytes,
)
from dehvf_ds.planning.plan import BACKBONES

PLACE = PlanConfig()
FLOPS = 10**13
STEP = MicroStep(rows=16, checkpointing=False, activation_bytes=2**33, flops=16 * FLOPS, tower_flops=0)


def parameters_of(llm: str, rank: int) -> Parameters:
    text, vision = BACKBONES[llm], BACKBONES["clip-vit-large-patch14"]
    config = DehvfConfig(text_config=text, vision_config=vision, rank=128, lora=LORA | {"rank": rank})
    return memory.count_parameters(memory.build_on_meta(config), 1_000_000)


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return parameters_of("llama-13b", 4)


def sharding(strategy: Strategy = "ZeRO-3", nodes: int = 1, gpus: int = 8, **zero: int) -> Sharding:
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 20_000_000} | zero}
    read = Sharding.read(given, nodes=nodes, gpus_per_node=gpus)
    return replace(read, strategy=strategy, element_bytes=2)


def planned(
    parameters: Parameters, strategy: Strategy, place: PlanConfig, step: MicroStep = STEP
) -> Estimate:
    spread = sharding(strategy, place.nodes, place.gpus_per_node)
    return estimate(parameters, step, spread, place, accumulation=1)


def test_counts(parameters: Parameters) -> None:
    small = parameters_of("llama-7b", 8)
    assert (small.language, small.tower, small.trainable) == (6_738_415_616, 303_179_776, 5_156_224)
    counted = (parameters.language, parameters.tower, parameters.trainable)
    assert counted == (13_015_864_320, 303_179_776, 4_585_088)
    assert parameters.lora == 40 * 4 * (13824 + 5120)
    # A layer is gathered at once: attention, FFN and two norms.
    assert parameters.largest == 32000 * 5120
    assert parameters.unit == 4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120
    assert memory.checkpoint_bytes(parameters) == 16 * 4_585_088 < 100e6


def test_where_the_frozen_weights_lie(parameters: Parameters) -> None:
    whole, kept = parameters.frozen * 2, (parameters.frozen - parameters.partitioned) * 2
    assert 0 < kept < whole / 1000
    expected = {
        "ZeRO-2": whole,
        "ZeRO-3": whole / 16 + kept,
        "ZeRO-3 + hpZ": whole / 16 + whole / 8 + kept,
        "ZeRO-3 + offload": kept * 17 / 16,
    }
    for strategy in JSON_NAMES:
        held = resting_bytes(parameters, sharding(strategy, nodes=2))
        assert held["frozen LLM"] + held["frozen tower"] == pytest.approx(expected[strategy], rel=1e-6)
    for strategy, pinned in {"ZeRO-3": 0, "ZeRO-2": 0, "ZeRO-3 + offload": whole}.items():
        assert memory.host_bytes(parameters, sharding(strategy)) == {"pinned": pinned}


def test_buckets_are_whole_and_two_where_zero2_overlaps(parameters: Parameters) -> None:
    for stage, size, overlap, expected in (
        (2, 2e7, True, 160_000_000),
        (2, 2e7, False, 80_000_000),
        (3, "auto", False, 2_000_000_000),
    ):
        zero = {"stage": stage, "reduce_bucket_size": size, "overlap_comm": overlap}
        read = Sharding.read({"zero_optimization": zero}, nodes=1, gpus_per_node=8)
        assert resting_bytes(parameters, read)["gradient buckets"] == expected


def test_gathers_hide_from_the_stated_micro_batch_on(parameters: Parameters) -> None:
    place = PlanConfig(nodes=2)
    rows = planned(parameters, "ZeRO-3", place).hiding_rows
    steps = [replace(STEP, flops=(rows + more) * FLOPS) for more in (0, -1)]
    found = [planned(parameters, "ZeRO-3", place, step) for step in steps]
    assert [e.gather_s <= e.arithmetic_s for e in found] == [True, False]
    # A GPU receives all but its own shard.
    received = gathered_elements(parameters, sharding(nodes=2)) * 2 * 15 / 16
    assert found[0].gather_bytes == pytest.approx(received)


def test_hpz_spares_slow_links_and_is_zero3_where_auto_makes_no_copy(parameters: Parameters) -> None:
    slow = PlanConfig(nodes=2, internode_gb_s=1)
    zero3, hpz, zero2 = (planned(parameters, s, slow) for s in ("ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-2"))
    assert (hpz.gather_s < zero3.gather_s / 10, zero2.gather_s) == (True, 0)
    for place in (PLACE, PlanConfig(nodes=4, gpus_per_node=1)):
        zero3, hpz = (planned(parameters, s, place) for s in ("ZeRO-3", "ZeRO-3 + hpZ"))
        assert replace(hpz, strategy="ZeRO-3") == zero3


def test_a_block_travels_twice_beyond_the_window_and_once_within(parameters: Parameters) -> None:
    language = parameters.language - parameters.persistent_language
    beyond = gathered_elements(parameters, sharding())
    assert beyond == pytest.approx(parameters.partitioned + language, rel=0.05)
    window = {"stage3_max_live_parameters": 3 * 10**10}
    assert gathered_elements(parameters, sharding(**window)) == parameters.partitioned


def test_the_choice_is_the_fastest_that_fits(parameters: Parameters) -> None:
    plans = {strategy: planned(parameters, strategy, PLACE) for strategy in JSON_NAMES}
    fastest = choose(list(plans.values()), None)
    assert fastest is not None
    assert fastest.step_s <= min(plan.step_s for plan in plans.values()) * 1.03
    assert choose(list(plans.values()), plans["ZeRO-3"].total_bytes) is plans["ZeRO-3"]
    assert choose(list(plans.values()), 1.0) is None
    # Where only recomputation fits, it is taken.
    smaller = replace(STEP, checkpointing=True, activation_bytes=2**30)
    recomputed = planned(parameters, "ZeRO-3", PLACE, smaller)
    assert choose([*plans.values(), recomputed], recomputed.total_bytes) is recomputed
