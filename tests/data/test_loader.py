from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from dehvf_ds.batch import IGNORE_INDEX
from dehvf_ds.config import AugmentConfig, DataConfig, UserError
from dehvf_ds.data import examples as examples_module
from dehvf_ds.data import loader as loader_module
from dehvf_ds.data.examples import open_examples
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import build_loader, build_validation_loader, epoch_samples, open_validation
from dehvf_ds.data.storage import Storage


@pytest.fixture
def build(byte_bpe, tiny_transform):
    def make(config, **place):
        place = {"rank": 0, "world_size": 1, "micro_batch_size": 4, "accumulation": 1, **place}
        place = {"start_sample": 0, "num_steps": 6, **place}
        return build_loader(config, open_examples(config, seed=5), byte_bpe, tiny_transform, seed=5, **place)

    return make


@pytest.fixture
def build_validation(byte_bpe, tiny_transform):
    def make(config, **place):
        place = {"rank": 0, "world_size": 1, "micro_batch_size": 4, **place}
        return build_validation_loader(config, open_validation(config), byte_bpe, tiny_transform, **place)

    return make


def data_config(directory, **changes):
    return DataConfig(**{"train": str(directory), "num_workers": 0, "shuffle_window": 8, **changes})


def texts(batches, tokenizer):
    """The texts of the rows with a label."""
    return [
        tokenizer.decode(ids[mask.bool()])
        for b in batches
        for ids, mask, labels in zip(b.input_ids, b.attention_mask, b.labels, strict=True)
        if (labels != IGNORE_INDEX).any()
    ]


def colours(batch):
    """The red of each row's picture, which is its row's number."""
    pixels = batch.pixel_values if batch.picture is None else batch.pixel_values[batch.picture]
    return torch.round(pixels[:, 0, 0, 0] * 255).tolist()


ALL = [f"Caption of the picture: The dog {i} runs {k}.</s>" for i in range(10) for k in range(2)]


def test_epoch_holds_every_caption_once_beside_its_picture(make_shards, build, byte_bpe):
    loader = build(data_config(make_shards(10, 4)), num_steps=5)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    assert sorted(texts(batches, byte_bpe)) == ALL
    for batch in batches:
        # Counted in the worker, with the positions of the loss.
        assert batch.facts == replace(batch, facts=None).count()
        assert batch.supervised is not None
        assert colours(batch) == [int(key.removeprefix("row")) for key in batch.keys]


@pytest.mark.parametrize("bucket_steps", [0, 2])
def test_captions_kept_together_share_a_picture_and_a_view(make_shards, build, bucket_steps, monkeypatch):
    """Every caption once an epoch, each beside its picture; two ranks decode each picture about once."""
    decoded, decode = [], examples_module.decode_image
    monkeypatch.setattr(
        examples_module, "decode_image", lambda data, **more: decoded.append(1) or decode(data, **more)
    )
    config = data_config(
        make_shards(64, 16),
        shuffle_window=100,
        captions_together=2,
        bucket_steps=bucket_steps,
        augment=AugmentConfig(flip=0.5, min_crop=0.5),
    )
    place = {"world_size": 2, "micro_batch_size": 8, "accumulation": 1}
    batches = [batch for rank in range(2) for batch in build(config, rank=rank, num_steps=8, **place)]
    rows = Counter(key for batch in batches for key in batch.keys)
    assert rows == {f"row{number}": 2 for number in range(64)}
    assert len(decoded) == sum(len(batch.pixel_values) for batch in batches) <= 66
    for batch in batches:
        assert colours(batch) == [int(key.removeprefix("row")) for key in batch.keys]
    # A resumption elsewhere reads the rest of the same groups.
    place |= {"world_size": 1, "micro_batch_size": 4, "accumulation": 4}
    resumed = [b.keys for b in build(config, start_sample=96, num_steps=2, **place)]
    groups = [
        [b.keys[i : i + 2] for b in half[6:] for i in range(0, 8, 2)] for half in (batches[:8], batches[8:])
    ]
    assert list(chain(*resumed)) == list(chain(*chain(*zip(*groups, strict=True))))


# Torch advises against more workers than cores.
@pytest.mark.filterwarnings(r"ignore:\s*This DataLoader will create:UserWarning")
def test_workers_change_nothing(make_shards, build):
    config = data_config(make_shards(10, 4))
    alone = list(build(config))
    state = torch.get_rng_state()
    for workers in (1, 3):
        shared = list(build(replace(config, num_workers=workers)))
        assert [b.keys for b in shared] == [b.keys for b in alone]
        for a, b in zip(shared, alone, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.pixel_values, b.pixel_values)
            assert colours(a) == colours(b)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_next_batch_is_taken_while_a_step_runs_and_no_further() -> None:
    asked, second = [], threading.Event()

    def batches():
        for number in range(4):
            asked.append(number)
            if number == 1:
                second.set()
            yield number
        raise RuntimeError("a worker exited unexpectedly")

    taken = loader_module._taken(batches(), pins=False, ahead=True)
    assert next(taken) == 0
    assert second.wait(timeout=60)
    time.sleep(0.2)
    assert asked == [0, 1]
    assert [next(taken) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(taken)
    taken = loader_module._taken(iter([5, 6]), pins=False, ahead=True)
    assert list(taken) == [5, 6]


def test_who_stops_does_not_wait_for_a_worker_that_hangs(monkeypatch) -> None:
    hangs, waited = threading.Event(), []
    monkeypatch.setattr(loader_module, "wait", lambda futures, timeout: waited.append(timeout))

    def batches():
        yield 0
        hangs.wait(timeout=60)

    taken = loader_module._taken(batches(), pins=False, ahead=True)
    assert next(taken) == 0
    taken.close()
    assert waited == [5]
    hangs.set()


@pytest.mark.parametrize("bucket_steps", [0, 2])
def test_ranks_share_the_steps_of_one_and_resume_on_others(make_shards, build, bucket_steps):
    config = data_config(make_shards(10, 4), bucket_steps=bucket_steps)
    whole = [batch.keys for batch in build(config, micro_batch_size=8, num_steps=5)]
    for world_size, micro_batch_size in ((1, 4), (2, 2), (4, 2), (8, 1)):
        place = {"world_size": world_size, "micro_batch_size": micro_batch_size}
        place |= {"accumulation": 8 // world_size // micro_batch_size, "start_sample": 16, "num_steps": 3}
        ranks = [chain(*(b.keys for b in build(config, rank=r, **place))) for r in range(world_size)]
        assert list(chain(*zip(*ranks, strict=True))) == list(chain(*whole[2:]))


def test_dropped_tail(make_shards, build):
    config = data_config(make_shards(10, 4), tail="drop")
    assert [epoch_samples(replace(config, tail=tail), 20, 8) for tail in ("wrap", "drop")] == [20, 16]
    with pytest.raises(UserError, match=r"do not fill one batch of train.global_batch_size 32"):
        epoch_samples(config, 20, 32)
    batches = build(config, micro_batch_size=8, num_steps=4)
    rows = [tuple(ids.tolist()) for batch in batches for ids in batch.input_ids]
    assert len(set(rows[:16])) == len(set(rows[16:])) == 16


def damage(directory, rows):
    """Flips a byte in the pictures of these rows."""
    index = ShardIndex(directory)
    for row in rows:
        name, offset, _ = index.locate(row)
        data = bytearray((directory / name).read_bytes())
        data[data.index(b"\x89PNG", offset) + 20] ^= 1
        (directory / name).write_bytes(bytes(data))


def test_damaged_samples_are_substituted_by_others_of_their_shard(make_shards, build):
    directory = make_shards(10, 4)
    sound = list(build(data_config(directory), num_steps=5))
    damage(directory, [1, 5, 6])
    config = data_config(directory, on_bad="substitute", num_workers=2)
    found = list(build(config, num_steps=5))
    alone = build(replace(config, num_workers=0), num_steps=5)
    assert [(batch.keys, batch.substituted) for batch in alone] == [(b.keys, b.substituted) for b in found]
    drawn = ([int(key.removeprefix("row")) for b in batches for key in b.keys] for batches in (sound, found))
    pairs = list(zip(*drawn, strict=True))
    damaged = [(old, new) for old, new in pairs if old in (1, 5, 6)]
    assert all(new not in (1, 5, 6) and new // 4 == old // 4 for old, new in damaged)
    assert all(old == new for old, new in pairs if (old, new) not in damaged)
    notes = [note for batch in found for note in batch.substituted]
    assert len(notes) == len(damaged) == 6
    for (old, _), (shard, message) in zip(damaged, notes, strict=True):
        assert shard == f"tiny-00000{old // 4}.tar"
        assert f"sample {old} (" in message
    damage(directory, [4, 7])
    with pytest.raises(UserError, match=r"15 other samples of its shard are no better"):
        list(build(config, num_steps=5))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_ends_the_reading_is_one_line(make_shards, build, workers, monkeypatch):
    directory = make_shards(4, 4)
    damage(directory, [2])
    config = data_config(directory, num_workers=workers)
    with pytest.raises(UserError, match=r"000000.tar: sample 2 .* not the bytes that") as caught:
        list(build(config))
    assert "\n" not in str(caught.value)

    def fill(*_):
        raise OSError(28, "No space left on device", "/tmp")

    monkeypatch.setattr(Storage, "read", fill)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/tmp'$") as full:
        list(build(replace(config, on_bad="substitute")))
    assert full.value.errno == 28
    assert multiprocessing.active_children() == []


def test_a_worker_survives_the_signals_of_an_ending_job_but_not_its_rank(make_shards, build):
    config = data_config(make_shards(10, 4), num_workers=1)
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
    for _ in range(30):
        next(iterator)
    begin = time.monotonic()
    iterator.close()
    del iterator
    worker.join(10)
    assert not worker.is_alive()
    assert time.monotonic() - begin < 5


def test_validations_are_served_by_the_worker_that_started_before_the_training(
    make_shards, build_validation, byte_bpe
):
    config = data_config("unused", val=str(make_shards(9, 4)), num_workers=1)
    before = set(multiprocessing.active_children())
    loader = build_validation(config)
    assert set(multiprocessing.active_children()) == before
    loader.start()
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    expected = texts(build_validation(replace(config, num_workers=0)), byte_bpe)
    assert texts(loader, byte_bpe) == expected
    next(iter(loader))  # one that is ended early
    assert texts(loader, byte_bpe) == texts(loader, byte_bpe) == expected
    assert set(multiprocessing.active_children()) - before == started
    del loader
    assert set(multiprocessing.active_children()) == before


def test_validation_rows_are_the_same_on_any_ranks(make_shards, build_validation, byte_bpe):
    config = data_config("unused", val=str(make_shards(5, 2)), val_samples=9)
    for world_size in (1, 3, 4):
        place = {"world_size": world_size, "micro_batch_size": 2}
        ranks = [list(build_validation(config, rank=rank, **place)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(texts(chain(*ranks), byte_bpe)) == ALL[:9]
