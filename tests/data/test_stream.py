from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from dehvf_ds.data.stream import MAX_STREAMS, Bucketing, SampleOrder, micro_batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dehvf_ds.data.examples import Examples

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GLOBAL_BATCH = 24
WORLD_SIZES = (1, 2, 3, 4, 8)

# Empty shards, shards of one example, and enough of them for one, several and all streams.
shard_sizes = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=70, max_size=90),
    st.lists(st.sampled_from([0, 1, 60]), min_size=2, max_size=8),
).filter(lambda sizes: sum(sizes) > GLOBAL_BATCH)
windows = st.sampled_from([1, 2, 5, 8, 33, 100_000])
tails = st.sampled_from(["wrap", "drop"])


def text_lengths(epoch, examples):
    return (examples * 7919 + epoch) % 101


def build(sizes, *, window=8, seed=0, tail="wrap", bucket_steps=0, global_batch=GLOBAL_BATCH):
    bucketing = Bucketing(steps=bucket_steps, global_batch_size=global_batch, lengths=text_lengths)
    return SampleOrder(
        sizes,
        seed=seed,
        window=window,
        epoch_length=sum(sizes) // global_batch * global_batch if tail == "drop" else None,
        bucketing=bucketing if bucket_steps else None,
    )


def read(order, begin, end):
    return [order.sample_at(position) for position in range(begin, end)]


def consume(order, world_size, *, start_sample=0, num_steps, global_batch=GLOBAL_BATCH, accumulation=1):
    """The global batches, put together from what every rank reads."""
    micro = global_batch // (world_size * accumulation)
    place = {"world_size": world_size, "micro_batch_size": micro, "accumulation": accumulation}
    ranks = [
        list(micro_batches(order, rank=rank, start_sample=start_sample, num_steps=num_steps, **place))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {num_steps * accumulation}
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    steps = []
    for step in range(num_steps):
        mine = [chain(*r[step * accumulation : (step + 1) * accumulation]) for r in ranks]
        steps.append([sample for row in zip(*mine, strict=True) for sample in row])
    return steps


@given(shard_sizes, st.integers(-5, 2**63), windows, tails, st.sampled_from([0, 1, 3]), st.integers(0, 4))
@settings(few, max_examples=60)
def test_an_epoch_holds_no_example_twice(sizes, seed, window, tail, bucket_steps, epoch):
    order = build(sizes, seed=seed, window=window, tail=tail, bucket_steps=bucket_steps)
    length = order.epoch_length
    assert length == (sum(sizes) if tail == "wrap" else sum(sizes) // GLOBAL_BATCH * GLOBAL_BATCH)
    drawn = read(order, epoch * length, (epoch + 1) * length)
    assert {e for e, _ in drawn} == {epoch}
    examples = {example for _, example in drawn}
    assert len(examples) == length
    assert examples <= set(range(sum(sizes)))


@pytest.mark.parametrize("sizes", [[1000], [7] * 64, [1] * 70, [50, 0, 3, 900]])
@pytest.mark.parametrize("window", [4, 100_000])
def test_others_are_left_out_in_each_epoch(sizes, window):
    order = build(sizes, window=window, tail="drop")
    left = sum(sizes) - order.epoch_length
    assert left > 0
    missing = []
    for epoch in range(40):
        begin = epoch * order.epoch_length
        seen = {example for _, example in read(order, begin, begin + order.epoch_length)}
        missing.append(frozenset(range(sum(sizes))) - seen)
    assert all(len(examples) == left for examples in missing)
    assert len(set(missing)) > 30
    # 40 epochs leave out 40 x left examples; none of them again and again.
    assert max(Counter(chain(*missing)).values()) < 40 * left / sum(sizes) + 15


@pytest.mark.parametrize("epoch_length", [0, 13])
def test_an_epoch_longer_than_the_data_is_refused(epoch_length):
    with pytest.raises(ValueError, match="out of 12 examples"):
        SampleOrder([4] * 3, seed=0, window=8, epoch_length=epoch_length)


@given(shard_sizes, windows, tails, st.sampled_from([0, 3]), st.integers(0, 99), st.integers(1, 4))
@few
def test_one_global_sequence_for_every_world_size(sizes, window, tail, bucket_steps, start, num_steps):
    order = build(sizes, window=window, tail=tail, bucket_steps=bucket_steps)
    flat = read(order, start, start + num_steps * GLOBAL_BATCH)
    alone = [flat[step * GLOBAL_BATCH :][:GLOBAL_BATCH] for step in range(num_steps)]
    for world_size in WORLD_SIZES:
        for accumulation in {1, 3 if world_size != 3 else 2}:
            fresh = build(sizes, window=window, tail=tail, bucket_steps=bucket_steps)
            place = {"start_sample": start, "num_steps": num_steps, "accumulation": accumulation}
            assert consume(fresh, world_size, **place) == alone


@given(shard_sizes, windows, tails, st.sampled_from([0, 2]), st.sampled_from(WORLD_SIZES), st.integers(0, 30))
@few
def test_resuming_on_other_ranks_reads_what_was_not_yet_seen(sizes, window, tail, bucket_steps, ranks, done):
    case = {"window": window, "tail": tail, "bucket_steps": bucket_steps}
    before = list(chain(*consume(build(sizes, **case), 4, num_steps=done)))
    order = build(sizes, **case)
    # Without bucketing another global batch size resumes as well.
    batch = GLOBAL_BATCH if bucket_steps else 2 * GLOBAL_BATCH
    steps = -(-2 * order.epoch_length // batch)
    after = list(chain(*consume(order, ranks, start_sample=len(before), num_steps=steps, global_batch=batch)))
    assert before + after == read(build(sizes, **case), 0, len(before) + len(after))
    epoch = len(before) // order.epoch_length
    seen = [sample for sample in before + after if sample[0] == epoch]
    assert len(set(seen)) == len(seen) == order.epoch_length


@given(shard_sizes, windows, tails, st.sampled_from([0, 2]), st.randoms())
@few
def test_random_access_is_sequential_access(sizes, window, tail, bucket_steps, random):
    case = {"window": window, "tail": tail, "bucket_steps": bucket_steps}
    used = build(sizes, **case)
    sequence = read(used, 0, 3 * used.epoch_length)
    positions = random.sample(range(len(sequence)), 30)
    assert [used.sample_at(p) for p in positions] == [sequence[p] for p in positions]
    assert [build(sizes, **case).sample_at(p) for p in positions] == [sequence[p] for p in positions]


@given(shard_sizes, windows, tails, st.integers(0, 5))
@few
def test_a_position_names_its_stream_in_every_epoch(sizes, window, tail, epoch):
    """Each stream's examples lie in about one C-th of the data, the same in every epoch."""
    order = build(sizes, window=window, tail=tail)
    streams = order.num_streams
    for stream in range(streams):
        positions = [
            p
            for p in range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
            if p % streams == stream
        ]
        drawn = [order.sample_at(p)[1] for p in positions]
        ideal = sum(sizes) / streams
        assert all(ideal * stream - 2 * streams < x < ideal * (stream + 1) + 2 * streams for x in drawn)


def test_seed_and_epoch_change_the_order():
    def epoch_of(seed, epoch):
        return [e for _, e in read(build([50] * 4, seed=seed, window=20), epoch * 200, (epoch + 1) * 200)]

    orders = [epoch_of(0, 0), epoch_of(0, 1), epoch_of(1, 0)]
    assert orders[0] == epoch_of(0, 0)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, [2, 26, 73, 78, 3, 28, 72, 76, 7, 32, 74, 77]),
        ({"tail": "drop"}, [10, 37, 59, 90, 15, 34, 54, 85, 9, 38, 61, 84]),
        ({"bucket_steps": 2}, [3, 28, 72, 78, 2, 26, 73, 76, 6, 33, 55, 80]),
        ({"window": 1000}, [16, 35, 66, 92, 4, 39, 61, 96, 0, 47, 73, 76]),
    ],
)
def test_order_golden(case, expected):
    order = build([40, 30, 1, 29], seed=11, **case)
    assert order.num_streams == 4
    assert [example for _, example in read(order, 1000, 1012)] == expected


@pytest.mark.parametrize(
    ("shards", "streams"), [(1, 1), (2, 2), (3, 2), (7, 4), (64, 64), (65, 64), (500, MAX_STREAMS)]
)
def test_number_of_streams_depends_on_the_shards_alone(shards, streams):
    assert build([100] * shards).num_streams == streams
    assert build([100] * shards + [0] * 50).num_streams == streams


@pytest.mark.parametrize("tail", ["wrap", "drop"])
@pytest.mark.parametrize("bucket_steps", [0, 4])
def test_a_rank_owns_whole_streams_and_keeps_its_shards(tail, bucket_steps):
    order = build([100] * 63 + [70], window=1000, tail=tail, bucket_steps=bucket_steps, global_batch=64)
    epochs = 5 * order.epoch_length // 8 * 8
    touched = [{order.sample_at(p)[1] // 100 for p in range(rank, epochs, 8)} for rank in range(8)]
    # 64 shards in 64 streams over 8 ranks: 8 shards each, and where the stretches' bounds cut one.
    assert all(len(shards) <= 16 for shards in touched)
    assert sorted(set().union(*touched)) == list(range(64))


def test_a_stream_reads_its_shards_one_after_another():
    order = build([1000] * 20, window=100)
    stream = [order.sample_at(p)[1] // 1000 for p in range(0, order.num_examples, order.num_streams)]
    for begin in range(0, len(stream) - 100, 50):
        assert len(set(stream[begin : begin + 100])) <= 3


@pytest.mark.parametrize("window", [1, 2, 3, 50, 51, 4999])
def test_window_bounds_how_far_an_example_moves(window):
    drawn = np.array([example for _, example in read(build([5000], window=window), 0, 5000)])
    moved = np.abs(drawn - np.arange(5000))
    assert moved.max() < window
    assert moved.mean() > window / 6 - 1


def test_a_window_mixes_over_the_bounds_of_its_blocks():
    counts = np.zeros((200, 200))
    for seed in range(300):
        drawn = [example for _, example in read(build([200], window=80, seed=seed), 0, 200)]
        counts[np.arange(200), drawn] += 1
    # Every place of the middle is filled from 80 examples about equally often.
    middle = counts[60:140]
    assert ((middle > 0).sum(1) >= 65).all()
    assert middle.max() < 25


def test_a_window_as_long_as_the_stream_shuffles_it_whole():
    drawn = [[e for _, e in read(build([100], window=100, seed=seed), 0, 100)] for seed in range(200)]
    first = Counter(order[0] for order in drawn)
    assert len(first) > 70
    assert max(first.values()) < 12


def test_a_stop_in_a_large_data_set_draws_a_few_blocks_only():
    order = build([1000] * 20_000, window=4096, bucket_steps=2, global_batch=1024, tail="drop")
    drawn = read(order, 9_765_000 // 1024 * 1024, 9_765_000 // 1024 * 1024 + 2048)
    assert len(set(drawn)) == 2048
    assert len(order._blocks._kept) <= 2 * MAX_STREAMS
    assert all(len(block) <= 2048 for block in order._blocks._kept.values())


@given(shard_sizes, windows, tails, st.sampled_from([1, 2, 5]))
@few
def test_bucketing_keeps_a_windows_samples_of_each_stream(sizes, window, tail, steps):
    drawn = build(sizes, window=window, tail=tail)
    sorted_ = build(sizes, window=window, tail=tail, bucket_steps=steps)
    streams, span = drawn.num_streams, steps * GLOBAL_BATCH
    for begin in range(0, 3 * drawn.epoch_length, span):
        for stream in range(streams):
            positions = [p for p in range(begin, begin + span) if p % streams == stream]
            found = [sorted_.sample_at(p) for p in positions]
            expected = [drawn.sample_at(p) for p in positions]
            assert Counter(found) == Counter(expected)
            assert [epoch for epoch, _ in found] == [epoch for epoch, _ in expected]


@given(shard_sizes, st.sampled_from([2, 3]))
@few
def test_bucketing_against_a_plain_reference(sizes, steps):
    """Of each stream's samples in a window, one step holds the shortest, another the next ones."""
    drawn, sorted_ = build(sizes), build(sizes, bucket_steps=steps)
    streams, span, length = drawn.num_streams, steps * GLOBAL_BATCH, drawn.epoch_length
    for window in range(length // span):
        positions = range(window * span, (window + 1) * span)
        found = {p: text_lengths(*sorted_.sample_at(p)) for p in positions}
        for stream in range(streams):
            rows = [
                [found[p] for p in positions if p % streams == stream and p // GLOBAL_BATCH % steps == step]
                for step in range(steps)
            ]
            assert all(row == sorted(row) for row in rows)
            filled = sorted(row for row in rows if row)
            assert all(a[-1] <= b[0] for a, b in pairwise(filled))


def test_steps_of_a_bucket_window_come_in_a_drawn_order():
    order = build([500] * 64, bucket_steps=5, global_batch=128)
    lengths = np.array([text_lengths(*sample) for sample in read(order, 0, 50 * 128)])
    means = lengths.reshape(50, 128).mean(1)
    ranks = np.argsort(means.reshape(10, 5), axis=1)
    assert len({tuple(row) for row in ranks.tolist()}) > 5


def padding_share(order, steps, global_batch):
    lengths = np.array([text_lengths(*sample) for sample in read(order, 0, steps * global_batch)])
    rows = lengths.reshape(steps, global_batch)
    return 1 - lengths.sum() / (rows.max(1).sum() * global_batch)


def test_bucketing_saves_padding():
    case = {"window": 64, "global_batch": 128}
    plain = padding_share(build([500] * 64, **case), 60, 128)
    bucketed = padding_share(build([500] * 64, bucket_steps=20, **case), 60, 128)
    assert plain > 0.45
    assert bucketed < 0.2


counts_by_shard = st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=8).filter(
    lambda shards: any(shards)
)


class Sliced:
    """An array that can be sliced only, and notes the longest slice."""

    def __init__(self, values):
        self.values = values
        self.longest = 0

    def __getitem__(self, key):
        assert isinstance(key, slice)
        found = self.values[key]
        self.longest = max(self.longest, len(found))
        return found


def build_examples(shards, *, mode="all", seed=0):
    """Examples of shards given as counts of captions by row; text k is 10 k characters long."""
    captions = Sliced(np.array([count for shard in shards for count in shard], dtype=np.uint16))
    texts = [sum(max(count, 1) for count in shard) for shard in shards]
    lengths = Sliced(np.arange(sum(texts), dtype=np.uint32) * 10)
    rows = [len(shard) for shard in shards]
    return Examples(captions, rows, texts, lengths, mode=mode, seed=seed), captions, lengths  # type: ignore[arg-type]


@given(counts_by_shard, st.integers(0, 5))
@few
def test_all_captions_are_examples_of_their_row(shards, epoch):
    examples, captions, lengths = build_examples(shards)
    rows = [count for shard in shards for count in shard]
    expected = [(row, k if count else None) for row, count in enumerate(rows) for k in range(max(count, 1))]
    assert [examples.resolve(epoch, i) for i in range(len(examples))] == expected
    assert len(examples) == len(expected)
    assert examples.shard_sizes == tuple(sum(max(count, 1) for count in shard) for shard in shards)
    some = np.arange(len(expected))[::-1][::2]
    assert examples.lengths(epoch, some).tolist() == (some * 10).tolist()
    assert captions.longest <= max(len(shard) for shard in shards)
    assert lengths.longest <= max(examples.shard_sizes)


@given(counts_by_shard, st.integers(0, 5))
@few
def test_one_caption_of_each_row(shards, epoch):
    examples, captions, _ = build_examples(shards, mode="one")
    rows = [count for shard in shards for count in shard]
    found = [examples.resolve(epoch, i) for i in range(len(examples))]
    assert [row for row, _ in found] == list(range(len(rows)))
    assert examples.shard_sizes == tuple(len(shard) for shard in shards)
    ends = np.cumsum(np.maximum(rows, 1))
    for (row, caption), count in zip(found, rows, strict=True):
        assert caption is None if count == 0 else caption in range(count)
        text = ends[row] - max(count, 1) + (caption or 0)
        assert examples.lengths(epoch, np.array([row])).tolist() == [text * 10]
    assert captions.longest <= max(len(shard) for shard in shards)


def test_one_caption_is_drawn_by_seed_epoch_and_row():
    shards = [[5] * 25, [5] * 15 + [0]]
    examples = build_examples(shards, mode="one", seed=1)[0]
    assert len(examples) == 41
    drawn = [[examples.resolve(epoch, row)[1] for row in range(40)] for epoch in range(20)]
    assert drawn[3] == [examples.resolve(3, row)[1] for row in range(40)]
    assert drawn[3] != drawn[4]
    assert drawn[3][:15] != drawn[3][25:]
    assert {k for epoch in drawn for k in epoch} == {0, 1, 2, 3, 4}
    other = build_examples(shards, mode="one", seed=2)[0]
    assert drawn[3] != [other.resolve(3, row)[1] for row in range(40)]
    assert drawn[0][:8] == [2, 1, 4, 3, 1, 0, 2, 1]


@given(counts_by_shard, st.sampled_from(["all", "one"]))
@few
def test_alternatives_are_the_shards_others_once_and_its_own_captions_last(shards, mode):
    examples = build_examples(shards, mode=mode)[0]
    ends = np.cumsum(examples.shard_sizes)
    for example in range(len(examples)):
        shard = int(np.searchsorted(ends, example, side="right"))
        size = examples.shard_sizes[shard]
        found = [examples.alternative(example, attempt) for attempt in range(size)]
        assert found[0] == example
        assert sorted(found) == list(range(ends[shard] - size, ends[shard]))
        own = [examples.resolve(0, i)[0] == examples.resolve(0, example)[0] for i in found[1:]]
        assert own == sorted(own)
        for attempt in (-1, size):
            with pytest.raises(IndexError):
                examples.alternative(example, attempt)


def test_captions_of_a_damaged_row_get_different_alternatives():
    examples = build_examples([[5] * 20])[0]
    for attempt in (1, 2, 3):
        found = [examples.alternative(i, attempt) for i in range(45, 50)]
        assert len(set(found)) == 5
    rows = [examples.resolve(0, examples.alternative(45, attempt))[0] for attempt in range(1, 10)]
    assert len(set(rows)) >= 8


def test_examples_outside_are_refused():
    examples = build_examples([[2, 1]])[0]
    for example in (-1, 3):
        with pytest.raises(IndexError):
            examples.resolve(0, example)


def test_captions_of_a_picture_are_spread_by_the_window():
    examples = build_examples([[5] * 400])[0]
    order = SampleOrder(examples.shard_sizes, seed=0, window=4096)
    rows = [examples.resolve(*order.sample_at(i))[0] for i in range(2000)]
    assert sum(a == b for a, b in pairwise(rows)) < 20
