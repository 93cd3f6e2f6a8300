from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dehvf_ds.data.stream import MAX_STREAMS, Examples, SampleOrder, micro_batches

shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=90).filter(lambda sizes: sum(sizes) > 0)


def consume(order, world_size, *, global_batch, accumulation, start_step, num_steps):
    """The global batches, step by step, put together from what every rank reads."""
    micro = global_batch // (world_size * accumulation)
    ranks = [
        list(
            micro_batches(
                order,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro,
                accumulation=accumulation,
                start_step=start_step,
                num_steps=num_steps,
            )
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {num_steps * accumulation}
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    sequence = []
    for step in range(num_steps):
        mine = [chain(*r[step * accumulation : (step + 1) * accumulation]) for r in ranks]
        sequence.append([pair for row in zip(*mine, strict=True) for pair in row])
    return sequence


@given(shard_sizes, st.integers(-5, 2**63), st.integers(1, 200), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_example_exactly_once_an_epoch(sizes, seed, window, epoch):
    order = SampleOrder(sizes, seed=seed, window=window)
    total = sum(sizes)
    drawn = [order.sample_at(epoch * total + i) for i in range(total)]
    assert sorted(drawn) == [(epoch, i) for i in range(total)]


@given(shard_sizes, st.integers(0, 99), st.sampled_from([1, 7, 1000]), st.integers(0, 9), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_one_global_sequence_for_every_world_size(sizes, seed, window, start_step, num_steps):
    order = SampleOrder(sizes, seed=seed, window=window)
    alone = [
        [order.sample_at(step * 48 + i) for i in range(48)]
        for step in range(start_step, start_step + num_steps)
    ]
    for world_size in (1, 2, 3, 4, 8):
        for accumulation in (1, 2):
            fresh = SampleOrder(sizes, seed=seed, window=window)
            found = consume(
                fresh,
                world_size,
                global_batch=48,
                accumulation=accumulation,
                start_step=start_step,
                num_steps=num_steps,
            )
            assert found == alone


@given(shard_sizes, st.integers(0, 99), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_resume_continues_the_same_sequence(sizes, seed, done, more):
    place = {"rank": 1, "world_size": 2, "micro_batch_size": 3, "accumulation": 2}
    whole = micro_batches(
        SampleOrder(sizes, seed=seed, window=9), **place, start_step=0, num_steps=done + more
    )
    rest = micro_batches(SampleOrder(sizes, seed=seed, window=9), **place, start_step=done, num_steps=more)
    assert list(whole)[done * 2 :] == list(rest)


def test_seed_and_epoch_change_the_order():
    def epoch_of(seed, epoch):
        order = SampleOrder([50] * 4, seed=seed, window=20)
        return [order.sample_at(epoch * 200 + i)[1] for i in range(200)]

    orders = [epoch_of(0, 0), epoch_of(0, 1), epoch_of(1, 0)]
    assert orders[0] == epoch_of(0, 0)
    assert len({tuple(order) for order in orders}) == 3


def test_order_golden():
    order = SampleOrder([4, 4, 4], seed=11, window=4)
    assert order.num_streams == 2
    drawn = [order.sample_at(i) for i in range(24)]
    assert [example for _, example in drawn] == GOLDEN


GOLDEN = [0, 8, 1, 9, 3, 10, 4, 11, 2, 6, 5, 7, 1, 9, 0, 8, 2, 6, 3, 10, 5, 11, 4, 7]


@pytest.mark.parametrize(
    ("shards", "streams"), [(1, 1), (2, 2), (3, 2), (7, 4), (64, 64), (65, 64), (500, MAX_STREAMS)]
)
def test_number_of_streams_depends_on_the_shards_alone(shards, streams):
    assert SampleOrder([100] * shards, seed=0, window=10).num_streams == streams


def test_a_rank_owns_whole_streams_and_keeps_its_shards():
    sizes = [10] * 63 + [7]
    order = SampleOrder(sizes, seed=3, window=1000)
    touched = [
        {order.sample_at(p)[1] // 10 for p in range(rank, 3 * order.num_examples, 8)} for rank in range(8)
    ]
    # 64 shards in 64 streams over 8 ranks: 8 shards each, and where the stretches' bounds cut one.
    assert all(len(shards) <= 16 for shards in touched)
    assert sorted(set().union(*touched)) == list(range(64))


def test_window_bounds_how_far_an_example_moves():
    order = SampleOrder([5000], seed=0, window=50)
    drawn = np.array([order.sample_at(i)[1] for i in range(5000)])
    moved = np.abs(drawn - np.arange(5000))
    assert 5 < moved.mean() <= 50
    assert moved.max() <= 100


def test_window_of_one_keeps_the_stored_order():
    order = SampleOrder([100], seed=0, window=1)
    assert [order.sample_at(i)[1] for i in range(100)] == list(range(100))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 5))
def test_all_captions_are_examples_of_their_row(counts, epoch):
    examples = Examples(np.array(counts), [len(counts)], mode="all", seed=0)
    found = [examples.resolve(epoch, i) for i in range(len(examples))]
    expected = [(row, k if count else None) for row, count in enumerate(counts) for k in range(max(count, 1))]
    assert found == expected


def test_all_captions_sum_up_by_shard():
    examples = Examples(np.array([5, 5, 1, 0, 2]), [2, 2, 1], mode="all", seed=0)
    assert examples.shard_sizes == (10, 2, 2)
    assert len(examples) == 14


def test_one_caption_is_drawn_by_seed_epoch_and_row():
    counts = np.array([5] * 40 + [0])
    examples = Examples(counts, [41], mode="one", seed=1)
    assert len(examples) == 41
    drawn = [[examples.resolve(epoch, row)[1] for row in range(40)] for epoch in range(20)]
    assert drawn[3] == [examples.resolve(3, row)[1] for row in range(40)]
    assert drawn[3] != drawn[4]
    assert {k for epoch in drawn for k in epoch} == {0, 1, 2, 3, 4}
    other = Examples(counts, [41], mode="one", seed=2)
    assert drawn[3] != [other.resolve(3, row)[1] for row in range(40)]
    assert examples.resolve(0, 40) == (40, None)


def test_captions_of_a_picture_are_spread_by_the_window():
    examples = Examples(np.full(400, 5), [400], mode="all", seed=0)
    order = SampleOrder(examples.shard_sizes, seed=0, window=4096)
    rows = [examples.resolve(*order.sample_at(i))[0] for i in range(2000)]
    assert sum(a == b for a, b in pairwise(rows)) < 20
