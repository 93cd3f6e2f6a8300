from __future__ import annotations

from dataclasses import replace

import pytest
from training.planning.sizes import CLUSTER, ZERO, plan

from dehvf_ds.training.planning.estimate import choose
from dehvf_ds.training.planning.flops import language_flops, micro_step_flops
from dehvf_ds.training.planning.shapes import Shapes, Work
from dehvf_ds.training.planning.zero import STRATEGIES, Strategy, gathered_parameters


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_gpus_need_no_more_memory_each(strategy: Strategy, shapes: Shapes, work: Work) -> None:
    totals = [
        plan(shapes, work, replace(CLUSTER, nodes=n, gpus_per_node=g), strategy).total_bytes
        for n, g in [(1, 2), (1, 4), (1, 8), (2, 8), (4, 8)]
    ]
    if strategy == "ZeRO-3 + hpZ":
        # Its second copy of the weights begins with the second node.
        assert totals[3] > totals[2]
        totals = totals[3:]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_flops_are_4_a_parameter_and_token_and_more_with_recomputation(shapes: Shapes, work: Work) -> None:
    tokens = work.rows * work.tokens
    assert language_flops(shapes, work) == pytest.approx(4 * shapes.language * tokens, rel=0.01)
    recomputed = language_flops(shapes, replace(work, checkpointing=True))
    assert recomputed == pytest.approx(1.5 * language_flops(shapes, work), rel=0.01)


def test_gathers_hide_from_the_stated_micro_batch_on(shapes: Shapes, work: Work) -> None:
    cluster = replace(CLUSTER, nodes=2)
    rows = plan(shapes, work, cluster).hiding_rows
    enough, short = (plan(shapes, replace(work, rows=n), cluster) for n in (rows, rows - 1))
    assert enough.gather_s <= enough.arithmetic_s
    assert short.gather_s > short.arithmetic_s
    assert micro_step_flops(shapes, replace(work, rows=rows)) == pytest.approx(
        rows * micro_step_flops(shapes, replace(work, rows=1))
    )


def test_hpz_leaves_slow_links_between_nodes_alone(shapes: Shapes, work: Work) -> None:
    slow = replace(CLUSTER, nodes=2, inter_bytes_per_s=1e9)
    assert plan(shapes, work, slow, "ZeRO-3 + hpZ").gather_s < plan(shapes, work, slow).gather_s / 10
    assert plan(shapes, work, slow, "ZeRO-2").gather_s == 0


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 8), (4, 1)])
def test_hpz_is_zero3_where_auto_makes_no_second_copy(
    nodes: int, gpus_per_node: int, shapes: Shapes, work: Work
) -> None:
    cluster = replace(CLUSTER, nodes=nodes, gpus_per_node=gpus_per_node)
    plain = plan(shapes, work, cluster)
    assert plan(shapes, work, cluster, "ZeRO-3 + hpZ") == replace(plain, strategy="ZeRO-3 + hpZ")


def test_recomputation_gathers_the_decoder_once_more(shapes: Shapes) -> None:
    partitioned = shapes.language - (shapes.persistent - shapes.persistent_tower)
    kept, recomputed = (gathered_parameters(shapes, ZERO, "ZeRO-3", 8, x) for x in (False, True))
    assert recomputed - kept == partitioned
    # Beyond the window a block travels three times, within it twice.
    window = replace(ZERO, max_live=2 * shapes.language)
    forward = shapes.frozen - shapes.persistent
    assert recomputed == pytest.approx(forward + 2 * partitioned, rel=0.03)
    assert gathered_parameters(shapes, window, "ZeRO-3", 8, True) == forward + partitioned


def test_the_choice_is_the_fastest_that_fits(shapes: Shapes, work: Work) -> None:
    plans = [plan(shapes, work, CLUSTER, s) for s in STRATEGIES]
    by_name = {p.strategy: p for p in plans}
    chosen = choose(plans, None)
    assert chosen is not None
    assert chosen.step_s <= min(p.step_s for p in plans) * 1.03
    tight = choose(plans, by_name["ZeRO-3"].total_bytes)
    assert tight is not None
    assert tight.strategy == "ZeRO-3"
    assert choose(plans, 1.0) is None
    # Where only recomputation fits, it is taken.
    recomputed = plan(shapes, replace(work, checkpointing=True))
    assert choose([*plans, recomputed], recomputed.total_bytes) is recomputed
