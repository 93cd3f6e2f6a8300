from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_shards import picture_bytes, write_shards

from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data import records
from dehvf_ds.data.examples import Examples, open_examples, read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.order import SampleOrder
from dehvf_ds.data.shards import DamagedSample, ShardRow

few = settings(max_examples=20, deadline=None)
counts_by_shard = st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=8).filter(any)


class Sliced:
    """An array of which no slice is longer than its longest shard."""

    def __init__(self, values, sizes):
        self.values, self.most = np.array(values), max(sizes)

    def __getitem__(self, key):
        assert isinstance(key, slice)
        assert len(self.values[key]) <= self.most
        return self.values[key]


def build(shards, *, mode="all", seed=0) -> Examples:
    """Examples of shards given as counts of captions by row; text k is 10 k characters long."""
    rows = tuple(len(shard) for shard in shards)
    texts = tuple(sum(max(count, 1) for count in shard) for shard in shards)
    index: Any = SimpleNamespace(
        captions=Sliced([count for shard in shards for count in shard], rows),
        shard_rows=rows,
        shard_examples=texts,
        text_lengths=Sliced(range(0, 10 * sum(texts), 10), texts),
    )
    return Examples(index, mode=mode, seed=seed)


@given(counts_by_shard, st.integers(0, 5), st.sampled_from(["all", "one"]))
@settings(few, max_examples=40)
def test_all_captions_of_a_row_or_one(shards, epoch, mode):
    examples = build(shards, mode=mode)
    texts = [(row, k) for row, n in enumerate(n for s in shards for n in s) for k in range(max(n, 1))]
    has_captions = [n > 0 for shard in shards for n in shard]
    found = [examples.resolve(epoch, i) for i in range(len(examples))]
    assert all((caption is not None) == has_captions[row] for row, caption in found)
    if mode == "all":
        assert [(row, caption or 0) for row, caption in found] == texts
    else:
        assert [row for row, _ in found] == list(range(len(has_captions)))
        assert {(row, caption or 0) for row, caption in found} <= set(texts)
    assert examples.lengths(epoch, np.arange(len(examples))[::-1]).tolist() == [
        texts.index((row, caption or 0)) * 10 for row, caption in found[::-1]
    ]
    assert sum(examples.shard_sizes) == len(examples)
    for outside in (-1, len(examples)):
        with pytest.raises(IndexError):
            examples.resolve(epoch, outside)


@given(counts_by_shard, st.sampled_from(["all", "one"]), st.integers(1, 4))
@settings(few, max_examples=40)
def test_units_are_captions_of_one_row(shards, mode, size):
    examples = build(shards, mode=mode)
    units: dict[tuple, list[int]] = {}
    for example in range(len(examples)):
        row, caption = examples.resolve(0, example)
        units.setdefault((row, (caption or 0) // size if mode == "all" else 0), []).append(example)
    expected = {example: unit[0] for unit in units.values() for example in unit}
    asked = np.arange(len(examples))[::-1]
    assert examples.leaders(asked, size).tolist() == [expected[example] for example in asked]


def test_one_caption_is_drawn_by_seed_epoch_and_row():
    shards = [[5] * 25, [5] * 15 + [0]]
    drawn = [[build(shards, mode="one", seed=1).resolve(e, row)[1] for row in range(40)] for e in range(20)]
    assert drawn[3] != drawn[4]
    assert drawn[3][:15] != drawn[3][25:]
    assert {k for epoch in drawn for k in epoch} == {0, 1, 2, 3, 4}
    other = build(shards, mode="one", seed=2)
    assert drawn[3] != [other.resolve(3, row)[1] for row in range(40)]
    assert drawn[0][:8] == [2, 1, 4, 3, 1, 0, 2, 1]


@given(counts_by_shard, st.sampled_from(["all", "one"]))
@few
def test_substitutes_are_the_shards_others_once_and_its_own_captions_last(shards, mode):
    examples = build(shards, mode=mode)
    ends = np.cumsum(examples.shard_sizes)
    for example in range(len(examples)):
        shard = int(np.searchsorted(ends, example, side="right"))
        found = list(examples.substitutes(example))
        assert sorted([example, *found]) == list(
            range(ends[shard] - examples.shard_sizes[shard], ends[shard])
        )
        own = [examples.resolve(0, i)[0] == examples.resolve(0, example)[0] for i in found]
        assert own == sorted(own)


def test_captions_of_a_damaged_row_get_different_substitutes():
    examples = build([[5] * 20])
    found = [list(islice(examples.substitutes(i), 10)) for i in range(45, 50)]
    assert all(len({others[k] for others in found}) == 5 for k in range(3))
    assert len({examples.resolve(0, other)[0] for other in found[0]}) >= 8
    assert found[0][:4] == [50, 56, 62, 68]


def test_captions_of_a_picture_are_spread_by_the_window():
    examples = build([[5] * 400])
    order = SampleOrder(examples.shard_sizes, seed=0, window=4096)
    rows = [examples.resolve(*order.sample_at(i))[0] for i in range(2000)]
    assert sum(a == b for a, b in pairwise(rows)) < 20


PROBLEM = {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "social science"}
CHAT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]}
CAPTIONS = {"captions": ["x"]}


def write(directory, *rows, older=False):
    """Shards as they are indexed, or as an earlier version did: without a look at the pictures."""
    members = [{"json": json.dumps(record).encode()} | ({"png": png} if png else {}) for record, png in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_require_no_picture", lambda *_: None)
        shard = [ShardRow(key=f"r{number}", members=each) for number, each in enumerate(members)]
        write_shards(shard, directory, name="s", samples_per_shard=5, builder={})
    path = directory / "manifest.json"
    if older:
        manifest = json.loads(path.read_text()) | {"format_version": 2}
        for name in ("num_pictures", "tasks", "key_prefix"):
            del manifest[name]
        path.write_text(json.dumps(manifest))
    return directory


def test_no_caption_or_question_is_trained_without_its_picture(tmp_path):
    lost, missing = PROBLEM | {"image": "b.png"}, PROBLEM | {"image": "b.png", "image_missing": True}
    rows = [(CAPTIONS, None), (missing, None), (lost, None), (CAPTIONS, b"no picture")]
    index = ShardIndex(write(tmp_path / "older", *rows, older=True))
    assert read_sample(index, 1).image is None
    refusals = {
        0: r"sample 0 \(r0\): a caption without a picture.*--overwrite --skip-bad",
        2: r"sample 2 \(r2\): its record names a picture",
        3: r"sample 3 \(r3\): not a readable picture",
    }
    for row, message in refusals.items():
        with pytest.raises(DamagedSample, match=message):
            read_sample(index, row)
    write(tmp_path / "new", (CAPTIONS, picture_bytes()), (CAPTIONS, None))
    with pytest.raises(UserError, match=r"1 of 2 captions have no picture; make the index again"):
        open_examples(DataConfig(train=str(tmp_path / "new")), seed=0)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("wrong", ["caption", "chat", "scienceqa"])
def test_rows_of_another_task(tmp_path, older, wrong):
    rows = {"caption": (CAPTIONS, picture_bytes()), "chat": (CHAT, None), "scienceqa": (PROBLEM, None)}
    for task, row in rows.items():
        config = DataConfig(train=str(write(tmp_path / task, row, older=older)), task=wrong)

        refused = pytest.raises(UserError, match=rf"data\.task .*{wrong}")
        with nullcontext() if task == wrong else refused:
            # Rows that an old manifest does not count are refused when they are read.
            read_sample(open_examples(config, seed=0).index, 0, task=wrong)
