from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dehvf_ds.data import order as order_module
from dehvf_ds.data.order import MAX_STREAMS, Bucketing, MicroBatches, SampleOrder, Units

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GLOBAL_BATCH = 24

# Empty shards, shards of one example, and enough of them for one, several and all streams.
shard_sizes = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=70, max_size=90),
    st.lists(st.sampled_from([0, 1, 60]), min_size=2, max_size=8),
).filter(lambda sizes: sum(sizes) > GLOBAL_BATCH)
cases = st.fixed_dictionaries(
    {
        "sizes": shard_sizes,
        "seed": st.integers(-5, 2**63),
        "window": st.sampled_from([1, 2, 5, 8, 33, 100_000]),
        "tail": st.sampled_from(["wrap", "drop"]),
    }
)


def text_lengths(epoch, examples):
    return (examples * 7919 + epoch) % 101


# Captions of a picture, as in COCO; 3 and 1 are rarer there.
CAPTIONS = np.tile([5, 5, 6, 5, 7, 5, 3, 5, 5, 1], 20_000)
FIRST_CAPTIONS = np.cumsum(CAPTIONS) - CAPTIONS


def leaders(examples, size):
    firsts = FIRST_CAPTIONS[np.searchsorted(FIRST_CAPTIONS, examples, side="right") - 1]
    return examples - (examples - firsts) % size


def build(sizes, *, window=8, seed=0, tail="wrap", bucket_steps=0, global_batch=GLOBAL_BATCH, together=0):
    bucketing = Bucketing(steps=bucket_steps, global_batch_size=global_batch, lengths=text_lengths)
    return SampleOrder(
        sizes,
        seed=seed,
        window=window,
        epoch_length=sum(sizes) // global_batch * global_batch if tail == "drop" else None,
        bucketing=bucketing if bucket_steps else None,
        units=Units(together, partial(leaders, size=together)) if together else None,
    )


def read(order, begin, end):
    return [order.sample_at(position) for position in range(begin, end)]


def read_epoch(order, epoch):
    drawn = read(order, epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
    assert {e for e, _ in drawn} == {epoch}
    return [example for _, example in drawn]


@given(cases, st.sampled_from([0, 1, 3]), st.integers(0, 4), st.sampled_from([1, 2, 3, 8]))
@settings(few, max_examples=100)
def test_an_epoch_holds_no_example_twice(case, bucket_steps, epoch, together):
    order, num_examples = build(**case, bucket_steps=bucket_steps, together=together), sum(case["sizes"])
    length = num_examples if case["tail"] == "wrap" else num_examples // GLOBAL_BATCH * GLOBAL_BATCH
    examples = set(read_epoch(order, epoch))
    assert order.epoch_length == len(examples) == length
    assert examples <= set(range(num_examples))


@pytest.mark.parametrize(("sizes", "window"), [([1000], 4), ([1] * 70, 4), ([50, 0, 3, 900], 100_000)])
def test_others_are_left_out_in_each_epoch(sizes, window):
    order = build(sizes, window=window, tail="drop")
    left = sum(sizes) - order.epoch_length
    missing = [frozenset(range(sum(sizes))) - set(read_epoch(order, epoch)) for epoch in range(40)]
    assert {len(examples) for examples in missing} == {left}
    assert left > 0
    assert len(set(missing)) > 30
    # 40 epochs leave out 40 x left examples; none of them again and again.
    assert max(Counter(chain(*missing)).values()) < 40 * left / sum(sizes) + 15


@given(
    cases,
    st.sampled_from([0, 3]),
    st.sampled_from([(1, 12, 4), (2, 6, 3), (3, 4, 2), (4, 6, 6), (8, 3, 3), (8, 3, 1)]),
    st.integers(0, 999),
    st.integers(1, 4),
)
@settings(few, max_examples=60)
def test_ranks_share_one_global_sequence_from_any_sample_on(case, bucket_steps, ranks, start, num_steps):
    """Fresh orders find any position: what a resumption on other ranks reads is the rest."""
    world_size, micro_batch_size, together = ranks
    case |= {"bucket_steps": bucket_steps, "together": together}
    sequence = read(build(**case), 0, start + num_steps * GLOBAL_BATCH)[start:]
    accumulation = GLOBAL_BATCH // world_size // micro_batch_size
    parts = []
    for rank in range(world_size):
        batches = MicroBatches(
            order=build(**case),
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            start_sample=start,
            num_steps=num_steps,
        )
        assert len(list(batches)) == len(batches) == num_steps * accumulation
        assert {len(batch) for batch in batches} == {batches.micro_batch_size}
        rows = list(chain(*batches))
        parts.append([rows[i : i + together] for i in range(0, len(rows), together)])
    assert list(chain(*chain(*zip(*parts, strict=True)))) == sequence


@pytest.mark.parametrize("together", [2, 4, 5])
@pytest.mark.parametrize(
    ("tail", "batch", "bucket_steps"), [("wrap", 60, 0), ("drop", 660, 0), ("wrap", 60, 4)]
)
def test_captions_of_a_picture_stay_together(together, tail, batch, bucket_steps):
    """Few units are cut, at the ends of streams, blocks and epochs; full ones and others come mixed."""
    sizes = [int(part.sum()) for part in np.split(CAPTIONS[:4000], 16)]
    order = build(
        sizes, window=512, seed=3, tail=tail, global_batch=batch, bucket_steps=bucket_steps, together=together
    )
    begin = 2 * order.epoch_length
    drawn = read(order, begin, begin + 2 * order.epoch_length)
    units, groups = defaultdict(list), defaultdict(set)
    for position, (epoch, example) in enumerate(drawn, start=begin):
        unit = (epoch, int(leaders(np.array([example]), together)[0]))
        units[unit].append(position // together)
        groups[position // together].add(unit)
    several = [len(set(found)) == 1 for found in units.values() if len(found) > 1]
    assert np.mean(several) > 0.97
    full = [len(groups[group]) == 1 for group in sorted(groups)]
    assert all(0.3 < np.mean(full[i : i + 100]) < 1 for i in range(0, len(full) - 100, 100))


@given(cases, st.integers(0, 5))
@few
def test_a_position_names_its_stream_in_every_epoch(case, epoch):
    """Each stream's examples lie in about one C-th of the data, the same in every epoch."""
    order = build(**case)
    streams, ideal = order.num_streams, order.num_examples / order.num_streams
    for position in range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length):
        stream, drawn = position % streams, order.sample_at(position)[1]
        assert ideal * stream - 2 * streams < drawn < ideal * (stream + 1) + 2 * streams


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, [2, 26, 73, 78, 3, 28, 72, 76, 7, 32, 74, 77]),
        ({"tail": "drop"}, [10, 37, 59, 90, 15, 34, 54, 85, 9, 38, 61, 84]),
        ({"tail": "drop", "sizes": [40, 30, 2, 29]}, [10, 38, 60, 91, 15, 35, 55, 86, 9, 39, 62, 85]),
        ({"bucket_steps": 2}, [3, 28, 72, 78, 2, 26, 73, 76, 6, 33, 55, 80]),
        ({"window": 1000}, [16, 35, 66, 92, 4, 39, 61, 96, 0, 47, 73, 76]),
    ],
)
def test_order_golden(case, expected):
    order = build(**{"sizes": [40, 30, 1, 29], "seed": 11, **case})
    assert order.num_streams == 4
    assert [example for _, example in read(order, 1000, 1012)] == expected


def test_number_of_streams_depends_on_the_shards_alone():
    for shards, streams in ((1, 1), (3, 2), (7, 4), (64, 64), (65, 64), (500, MAX_STREAMS)):
        assert build([100] * shards).num_streams == build([100] * shards + [0] * 50).num_streams == streams
    with pytest.raises(ValueError, match="an epoch of 13 out of 12 examples"):
        SampleOrder([4] * 3, seed=0, window=8, epoch_length=13)


@pytest.mark.parametrize(("tail", "bucket_steps"), [("wrap", 4), ("drop", 0)])
def test_a_rank_owns_whole_streams_and_keeps_its_shards(tail, bucket_steps):
    order = build([100] * 63 + [70], window=1000, tail=tail, bucket_steps=bucket_steps, global_batch=64)
    epochs = 5 * order.epoch_length // 8 * 8
    touched = [{order.sample_at(p)[1] // 100 for p in range(rank, epochs, 8)} for rank in range(8)]
    # 64 shards in 64 streams over 8 ranks: 8 shards each, and those that are cut by the stretches' bounds.
    assert all(len(shards) <= 16 for shards in touched)
    assert sorted(set().union(*touched)) == list(range(64))
    # One after another.
    order = build([1000] * 20, window=100)
    stream = [order.sample_at(p)[1] // 1000 for p in range(0, order.num_examples, order.num_streams)]
    for begin in range(0, len(stream) - 100, 50):
        assert len(set(stream[begin : begin + 100])) <= 3


@pytest.mark.parametrize("window", [1, 2, 51, 4999])
def test_window_bounds_how_far_an_example_moves(window):
    moved = np.abs(np.array(read_epoch(build([5000], window=window), 0)) - np.arange(5000))
    assert moved.max() < window
    assert moved.mean() > window / 6 - 1


def test_a_window_mixes_evenly_over_the_bounds_of_its_blocks():
    counts = np.zeros((200, 200))
    for seed in range(300):
        counts[np.arange(200), read_epoch(build([200], window=80, seed=seed), 0)] += 1
    # Every place of the middle is filled from 80 examples about equally often.
    middle = counts[60:140]
    assert ((middle > 0).sum(1) >= 65).all()
    assert middle.max() < 25
    # One as long as the stream shuffles it completely.
    first = Counter(build([100], window=100, seed=seed).sample_at(0)[1] for seed in range(200))
    assert len(first) > 70
    assert max(first.values()) < 12


def test_a_stop_in_a_large_data_set_draws_a_few_blocks_only(monkeypatch):
    drawn, draw = [], order_module.random_words
    monkeypatch.setattr(order_module, "random_words", lambda *args: drawn.append(args[-1]) or draw(*args))
    order = build([1000] * 20_000, window=4096, bucket_steps=2, global_batch=1024, tail="drop")
    start = 9_765_000 // 1024 * 1024
    assert len(set(read(order, start, start + 2048))) == 2048
    # For each stream its shards and up to two blocks of half a window, with the three blocks below them.
    assert max(drawn) <= 2048
    assert sum(drawn) <= MAX_STREAMS * 6 * 2048


@given(cases, st.sampled_from([1, 2, 3, 5]))
@few
def test_bucketing_against_a_plain_reference(case, steps):
    """A window's samples of each stream stay; one step holds the shortest of them, another the next ones."""
    drawn, bucketed = build(**case), build(**case, bucket_steps=steps)
    streams, span, length = drawn.num_streams, steps * GLOBAL_BATCH, drawn.epoch_length
    for begin in range(0, 3 * length, span):
        inside = begin // length == (begin + span - 1) // length
        for stream in range(streams):
            positions = [p for p in range(begin, begin + span) if p % streams == stream]
            found = {p: bucketed.sample_at(p) for p in positions}
            expected = [drawn.sample_at(p) for p in positions]
            assert Counter(found.values()) == Counter(expected)
            assert [epoch for epoch, _ in found.values()] == [epoch for epoch, _ in expected]
            lengths = {p: text_lengths(*sample) for p, sample in found.items()}
            rows = [[n for p, n in lengths.items() if p // GLOBAL_BATCH % steps == s] for s in range(steps)]
            if inside:
                assert all(row == sorted(row) for row in rows)
                assert all(a[-1] <= b[0] for a, b in pairwise(sorted(row for row in rows if row)))


def test_bucketing_saves_padding():
    order = build([500] * 64, window=64, global_batch=128, bucket_steps=20)
    lengths = np.array([text_lengths(*sample) for sample in read(order, 0, 60 * 128)]).reshape(60, 128)
    assert 1 - lengths.sum() / (lengths.max(1).sum() * 128) < 0.2  # half without bucketing
    # The steps of a window come in a drawn order.
    assert 4 <= (np.diff(lengths[:20].mean(1)) > 0).sum() <= 15
