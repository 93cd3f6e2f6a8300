from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_shards import write_shards

from dehvf_ds.batch import IGNORE_INDEX
from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data import records
from dehvf_ds.data.damage import DamagedSample
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import (
    build_loader,
    build_validation_loader,
    epoch_samples,
    open_examples,
    read_all,
)
from dehvf_ds.data.shards import ShardRow


@pytest.fixture
def build(byte_bpe, tiny_transform):
    def make(config, **place):
        defaults = {
            "seed": 5,
            "rank": 0,
            "world_size": 1,
            "micro_batch_size": 4,
            "accumulation": 1,
            "start_sample": 0,
            "num_steps": 6,
        }
        return build_loader(config, byte_bpe, tiny_transform, **{**defaults, **place})

    return make


def data_config(directory, **changes):
    return DataConfig(train=str(directory), num_workers=0, shuffle_window=8, **changes)


def texts(batches, tokenizer):
    return [
        tokenizer.decode(ids[mask.bool()])
        for b in batches
        for ids, mask in zip(b.input_ids, b.attention_mask, strict=True)
    ]


def test_epoch_holds_every_caption_once(make_shards, build, byte_bpe):
    config = data_config(make_shards(10, 4))
    index, examples = open_examples(config, seed=5)
    assert (len(index), len(examples)) == (10, 20)
    loader = build(config, num_steps=5)
    assert len(loader) == 5
    found = texts(loader, byte_bpe)
    expected = {f"Caption of the picture: The dog {i} runs {k}.<eos>" for i in range(10) for k in range(2)}
    assert len(found) == 20
    assert set(found) == expected


def test_pixels_belong_to_their_row(make_shards, build):
    for batch in build(data_config(make_shards(10, 4)), num_steps=3):
        numbers = [int(key.removeprefix("row")) for key in batch.keys]
        assert torch.round(batch.pixel_values[:, 0, 0, 0] * 255).tolist() == numbers


def test_one_caption_an_epoch(make_shards, build):
    batches = list(build(data_config(make_shards(8, 4), captions="one"), num_steps=2))
    assert sorted(key for batch in batches for key in batch.keys) == [f"row{i}" for i in range(8)]


# Torch advises against more workers than cores.
@pytest.mark.filterwarnings(r"ignore:\s*This DataLoader will create:UserWarning")
def test_workers_change_nothing(make_shards, build):
    config = data_config(make_shards(10, 4))
    alone = list(build(config))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for workers in (1, 2, 3, 4):
        shared = list(build(replace(config, num_workers=workers)))
        assert [b.keys for b in shared] == [b.keys for b in alone]
        for a, b in zip(shared, alone, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.pixel_values, b.pixel_values)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_share_the_steps_of_one(make_shards, build):
    config = data_config(make_shards(10, 4))
    alone = [sorted(batch.keys) for batch in build(config, micro_batch_size=8)]
    ranks = [list(build(config, rank=r, world_size=2, micro_batch_size=2, accumulation=2)) for r in (0, 1)]
    together = [
        sorted(key for rank in ranks for batch in rank[2 * step : 2 * step + 2] for key in batch.keys)
        for step in range(6)
    ]
    assert together == alone


def test_resume_is_the_rest(make_shards, build):
    config = data_config(make_shards(10, 4))
    whole = [batch.keys for batch in build(config, num_steps=6)]
    assert [batch.keys for batch in build(config, start_sample=16, num_steps=2)] == whole[4:]


def test_resume_on_other_ranks_is_the_rest(make_shards, build):
    config = data_config(make_shards(10, 4), bucket_steps=2)
    whole = [batch.keys for batch in build(config, micro_batch_size=4, accumulation=2, num_steps=5)]
    for world_size, micro_batch_size in ((2, 2), (4, 2), (8, 1)):
        place = {"world_size": world_size, "micro_batch_size": micro_batch_size}
        place["accumulation"] = 8 // world_size // micro_batch_size
        ranks = [
            list(build(config, rank=rank, **place, start_sample=16, num_steps=3))
            for rank in range(world_size)
        ]
        rest = [key for rank in ranks for batch in rank for key in batch.keys]
        assert sorted(rest) == sorted(key for keys in whole[4:] for key in keys)


def test_dropped_tail(make_shards, build):
    config = data_config(make_shards(10, 4), tail="drop")
    assert epoch_samples(config, 20, 8) == 16
    assert epoch_samples(replace(config, tail="wrap"), 20, 8) == 20
    with pytest.raises(UserError, match=r"do not fill one batch of train.global_batch_size 32"):
        epoch_samples(config, 20, 32)
    batches = list(build(config, micro_batch_size=8, num_steps=4))
    for epoch in (batches[:2], batches[2:]):
        assert len({tuple(ids.tolist()) for batch in epoch for ids in batch.input_ids}) == 16


def damage(directory, rows):
    """Flips a byte in the pictures of these rows."""
    index = ShardIndex(directory)
    for row in rows:
        name, offset, _ = index.locate(row)
        data = bytearray((directory / name).read_bytes())
        data[data.index(b"\x89PNG", offset) + 20] ^= 1
        (directory / name).write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_replaced_by_others_of_their_shard(make_shards, build, workers):
    directory = make_shards(10, 4)
    sound = list(build(data_config(directory), num_steps=5))
    damage(directory, [1, 5, 6])
    config = replace(data_config(directory, on_bad="replace"), num_workers=workers)
    found = list(build(config, num_steps=5))
    assert [batch.keys for batch in build(config, num_steps=5)] == [batch.keys for batch in found]
    replaced = 0
    for before, after in zip(sound, found, strict=True):
        assert len(after.keys) == 4
        notes = list(after.replaced)
        for old, new in zip(before.keys, after.keys, strict=True):
            if old in ("row1", "row5", "row6"):
                shard, message = notes.pop(0)
                assert int(new.removeprefix("row")) // 4 == int(old.removeprefix("row")) // 4
                assert new not in ("row1", "row5", "row6")
                assert shard == f"tiny-00000{int(old.removeprefix('row')) // 4}.tar"
                assert f"sample {old.removeprefix('row')} (" in message
                replaced += 1
            else:
                assert new == old
        assert notes == []
    assert replaced == 6


def test_a_shard_without_a_sound_sample_stops_the_run(make_shards, build):
    directory = make_shards(8, 4)
    damage(directory, range(4, 8))
    with pytest.raises(UserError, match=r"nor could 15 others of its shard take its place"):
        list(build(data_config(directory, on_bad="replace"), num_steps=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_sample_is_one_line(make_shards, build, workers):
    directory = make_shards(4, 4)
    damage(directory, [2])
    loader = build(replace(data_config(directory), num_workers=workers))
    with pytest.raises(UserError, match=r"000000.tar: sample 2 .* not the bytes that") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


PROBLEM = {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "grade": "grade2"}
PROBLEM |= {"subject": "social science"}
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]


def rows_of(*records, picture=None) -> list[ShardRow]:
    members = {} if picture is None else {"png": picture}
    return [
        ShardRow(key=f"r{number}", members={"json": json.dumps(record).encode(), **members})
        for number, record in enumerate(records)
    ]


def as_indexed_before(directory, rows, monkeypatch):
    """Shards as an earlier version indexed them: without a look at the pictures."""
    with monkeypatch.context() as patch:
        patch.setattr(records, "_require_no_picture", lambda *_: None)
        write_shards(rows, directory, name="s", samples_per_shard=5, builder={})
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format_version": 2}
    for name in ("num_pictures", "tasks", "key_prefix"):
        del manifest[name]
    path.write_text(json.dumps(manifest))


def test_sample_that_lost_its_picture(tmp_path, monkeypatch):
    lost, missing = PROBLEM | {"image": "b.png"}, PROBLEM | {"image": "b.png", "image_missing": True}
    rows = rows_of({"file_name": "a.jpg", "captions": ["x"]}, missing, lost)
    broken = ShardRow(key="c", members={"json": b'{"captions": ["x"]}', "png": b"no picture"})
    as_indexed_before(tmp_path / "s", [*rows, broken], monkeypatch)
    index = ShardIndex(tmp_path / "s")
    with pytest.raises(
        DamagedSample, match=r"sample 0 \(r0\): a caption without a picture.*--overwrite --skip-bad"
    ):
        read_sample(index, 0)
    assert read_sample(index, 1).image is None
    with pytest.raises(DamagedSample, match=r"sample 2 \(r2\): its record names a picture"):
        read_sample(index, 2)
    with pytest.raises(DamagedSample, match=r"sample 3 \(c\): not a readable picture"):
        read_sample(index, 3)


def test_no_caption_is_trained_blind(tmp_path, monkeypatch, build):
    """Not in shards that an earlier version indexed, nor where an index counts fewer pictures than rows."""
    as_indexed_before(tmp_path / "s", rows_of(*[{"captions": ["x"]}] * 4), monkeypatch)
    with pytest.raises(UserError, match=r"a caption without a picture"):
        next(iter(build(data_config(tmp_path / "s"))))
    with monkeypatch.context() as patch:
        patch.setattr(records, "_require_no_picture", lambda *_: None)
        write_shards(rows_of({"captions": ["x"]}), tmp_path / "t", name="s", samples_per_shard=5, builder={})
    with pytest.raises(UserError, match=r"1 of 1 captions have no picture; make the index again"):
        open_examples(data_config(tmp_path / "t"), seed=0)


@pytest.mark.parametrize("old", [False, True])
def test_rows_of_another_task(tmp_path, monkeypatch, build, old):
    for name, record, wrong in (("p", PROBLEM, "chat"), ("c", {"conversations": TURNS}, "scienceqa")):
        directory = tmp_path / name
        if old:
            as_indexed_before(directory, rows_of(record, record), monkeypatch)
        else:
            write_shards(rows_of(record, record), directory, name="s", samples_per_shard=5, builder={})
        with pytest.raises(UserError, match=rf"data\.task .*{wrong}"):
            next(iter(build(data_config(directory, task=wrong))))


def test_shards_of_another_task(tmp_path, make_shards):
    write_shards(rows_of(PROBLEM), tmp_path / "p", name="p", samples_per_shard=5, builder={})
    with pytest.raises(UserError, match=r"sample 0 has no caption, as data\.task caption needs"):
        open_examples(data_config(tmp_path / "p"), seed=0)
    with pytest.raises(UserError, match=r"holds captions, not rows as data.task scienceqa needs"):
        open_examples(data_config(make_shards(), task="scienceqa"), seed=0)
    assert len(open_examples(data_config(tmp_path / "p", task="scienceqa"), seed=0)[1]) == 1


def test_evaluation_reads_every_row_once(make_shards):
    index = ShardIndex(make_shards(7, 3))
    shares = [[s.key for s in read_all(index, rank=r, world_size=3)] for r in range(3)]
    assert shares == [["row0", "row3", "row6"], ["row1", "row4"], ["row2", "row5"]]
    sample = next(read_all(index))
    assert sample.image.size == (6, 5)
    assert sample.record["captions"] == ["The dog 0 runs 0.", "The dog 0 runs 1."]


def test_workers_outlive_the_signals_of_an_ending_job(make_shards, build):
    config = replace(data_config(make_shards(10, 4)), num_workers=1)
    # As a rank on the CPU does; torch then starts threads in a worker before the worker's own code runs.
    torch.set_num_threads(torch.get_num_threads())
    iterator = iter(build(config, num_steps=60))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # Blocked in all threads but the one that waits for it.
    masks = [
        int(line.split()[1], 16)
        for path in Path(f"/proc/{worker.pid}/task").glob("*/status")
        for line in path.read_text().splitlines()
        if line.startswith("SigBlk")
    ]
    assert sum(not mask >> (signal.SIGTERM - 1) & 1 for mask in masks) == 1, masks
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    # A stranger's SIGTERM: sent by a process that is not the worker's parent.
    os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", f"kill -TERM {worker.pid}"], os.environ), 0)
    assert len(list(iterator)) == 59
    del iterator
    worker.join(10)
    assert not worker.is_alive()


def test_parent_ends_its_worker(make_shards, build):
    config = replace(data_config(make_shards(10, 4)), num_workers=1)
    iterator = iter(build(config, num_steps=60))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    begin = time.monotonic()
    iterator.close()
    del iterator
    worker.join(10)
    assert not worker.is_alive()
    assert time.monotonic() - begin < 5


def test_validations_are_served_by_the_worker_that_started_before_the_training(
    make_shards, byte_bpe, tiny_transform
):
    config = replace(data_config(make_shards(10, 4)), val=str(make_shards(9, 4)), num_workers=1)
    place = {"rank": 0, "world_size": 1, "micro_batch_size": 4}
    before = set(multiprocessing.active_children())
    loader = build_validation_loader(config, byte_bpe, tiny_transform, **place)
    assert set(multiprocessing.active_children()) == before
    loader.start()
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    alone = build_validation_loader(replace(config, num_workers=0), byte_bpe, tiny_transform, **place)
    expected = texts(alone, byte_bpe)
    assert texts(loader, byte_bpe) == expected
    next(iter(loader))  # one that is ended early
    assert texts(loader, byte_bpe) == texts(loader, byte_bpe) == expected
    assert set(multiprocessing.active_children()) - before == started
    del loader
    assert set(multiprocessing.active_children()) == before


def test_validation_rows_are_the_same_on_any_ranks(make_shards, byte_bpe, tiny_transform):
    config = DataConfig(train="unused", val=str(make_shards(5, 2)), val_samples=9, num_workers=0)
    for world_size in (1, 2, 3, 4):
        found, batches = [], set()
        for rank in range(world_size):
            loader = build_validation_loader(
                config, byte_bpe, tiny_transform, rank=rank, world_size=world_size, micro_batch_size=2
            )
            own = list(loader)
            assert [batch.keys for batch in loader] == [batch.keys for batch in own]
            batches.add(len(own))
            for batch in own:
                supervised = (batch.labels != IGNORE_INDEX).any(dim=1)
                found += [byte_bpe.decode(ids) for ids in batch.input_ids[supervised]]
        assert len(batches) == 1
        expected = [f"Caption of the picture: The dog {i} runs {k}.<eos>" for i in range(5) for k in range(2)]
        assert sorted(found) == expected[:9]
