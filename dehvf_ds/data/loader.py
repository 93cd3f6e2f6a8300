"""One rank's micro-batches in the order of ``stream.py``, read and decoded by worker processes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.index import IMAGE_MEMBERS, ShardIndex
from dehvf_ds.data.stream import Examples, SampleOrder, micro_batches
from dehvf_ds.data.transforms import ImageTransform, decode_image

PREFETCHED_BATCHES = 4


def read_sample(index: ShardIndex, row: int, *, epoch: int = 0, caption: int | None = None) -> Sample:
    """Reads and decodes one row.

    Args:
        index: the data set.
        row: the row's number.
        epoch: epoch in which it was drawn.
        caption: number of the caption to learn; it becomes the record's field ``caption``.

    Raises:
        UserError: the row is damaged, or lacks a picture that its record names.
    """
    members = index.read(row)
    where = f"{index.locate(row)[0]}: sample {members['__key__']}"
    try:
        record = json.loads(members["json"])
    except ValueError as error:
        raise UserError(f"{where}: its .json is not JSON ({error}); build the shards again") from error
    picture = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    names_picture = bool(record.get("file_name") or record.get("image")) and not record.get("image_missing")
    if picture is None and names_picture:
        raise UserError(
            f"{where}: its record names a picture, but the shard holds none; copy the shard again"
        )
    try:
        image = None if picture is None else decode_image(picture)
    except ValueError as error:
        raise UserError(f"{where}: {error}; repair the picture and build the shards again") from error
    if caption is not None:
        record["caption"] = record["captions"][caption]
    return Sample(key=members["__key__"], image=image, record=record, epoch=epoch)


def read_all(index: ShardIndex, *, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
    """Yields a rank's share of all rows for evaluation, in stored order: rank, rank + world_size, ..."""
    for row in range(rank, len(index), world_size):
        yield read_sample(index, row)


def open_examples(config: DataConfig, *, seed: int) -> tuple[ShardIndex, Examples]:
    """Opens the training shards and counts what an epoch goes through (``len`` of the second).

    Raises:
        UserError: the directory is unusable or holds rows of another task.
    """
    index = ShardIndex(config.train)
    captions = np.asarray(index.captions)
    if config.task == "caption" and not captions.all():
        row = int(np.argmin(captions))
        raise UserError(
            f"data.train {config.train}: sample {row} has no caption, as data.task caption needs; "
            "set data.task to the shards' own task, or data.train to caption shards"
        )
    if config.task == "scienceqa" and captions.any():
        raise UserError(
            f"data.train {config.train}: holds captions, not problems as data.task scienceqa needs"
        )
    return index, Examples(captions, index.shard_rows, mode=config.captions, seed=seed)


def build_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_transform: ImageTransform,
    *,
    seed: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    accumulation: int,
    start_step: int,
    num_steps: int,
) -> TrainingLoader:
    """Builds one rank's loader of ``num_steps * accumulation`` micro-batches.

    The order is drawn in this process, so the number of workers changes nothing but the speed. The state
    to resume from is the optimizer step: ``start_step`` continues after that many global batches.

    Args:
        config: shards, task and workers.
        tokenizer: the LLM's tokenizer.
        image_transform: the tower's transform.
        seed: seed of the order and of the choice of captions.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: rows of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        start_step: first optimizer step.
        num_steps: optimizer steps to deliver.

    Raises:
        UserError: the shards or the tokenizer are unusable. In iteration: a damaged sample, in one line.
    """
    index, examples = open_examples(config, seed=seed)
    order = SampleOrder(examples.shard_sizes, seed=seed, window=config.shuffle_window)
    collator = Collator(
        tokenizer, image_transform, task=config.task, max_tokens=config.max_tokens, prompt=config.prompt
    )
    sampler = _MicroBatchSampler(
        order, rank, world_size, micro_batch_size, accumulation, start_step=start_step, num_steps=num_steps
    )
    if config.num_workers:
        # Workers are forked after the tokenizer has run; without this it prints a warning in each.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TrainingLoader(
        _TrainingRows(index, examples),
        batch_sampler=sampler,
        collate_fn=_OrError(collator),
        num_workers=config.num_workers,
        worker_init_fn=_init_worker,
        prefetch_factor=PREFETCHED_BATCHES if config.num_workers else None,
        # Its own generator: an iteration must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )


class TrainingLoader(DataLoader):
    """A DataLoader of ``Batch`` whose workers hand a ``UserError`` over as one line, without a traceback."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields the micro-batches in order; raises the ``UserError`` of the first damaged sample."""
        batches = super().__iter__()
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise UserError(str(batch))
                yield batch
        finally:
            # The last reference: workers end here, not in a garbage collection that waits 5 s for each.
            del batches


class _TrainingRows(Dataset):
    """Examples by (epoch, number). A ``UserError`` is returned, for a worker's raise would wrap it."""

    def __init__(self, index: ShardIndex, examples: Examples):
        self._index = index
        self._examples = examples

    def __getitem__(self, drawn: tuple[int, int]) -> Sample | UserError:
        epoch, example = drawn
        row, caption = self._examples.resolve(epoch, example)
        try:
            return read_sample(self._index, row, epoch=epoch, caption=caption)
        except UserError as error:
            return UserError(str(error))


class _OrError:
    """Collates, or passes the first error among the samples on."""

    def __init__(self, collator: Collator):
        self._collator = collator

    def __call__(self, samples: Sequence[Sample | UserError]) -> Batch | UserError:
        errors = [sample for sample in samples if isinstance(sample, UserError)]
        return errors[0] if errors else self._collator([s for s in samples if isinstance(s, Sample)])


class _MicroBatchSampler(Sampler[list[tuple[int, int]]]):
    def __init__(
        self,
        order: SampleOrder,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        accumulation: int,
        *,
        start_step: int,
        num_steps: int,
    ):
        self._order = order
        self._place = {
            "rank": rank,
            "world_size": world_size,
            "micro_batch_size": micro_batch_size,
            "accumulation": accumulation,
            "start_step": start_step,
            "num_steps": num_steps,
        }

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return micro_batches(self._order, **self._place)

    def __len__(self) -> int:
        return self._place["num_steps"] * self._place["accumulation"]


def _init_worker(worker_id: int) -> None:
    """Leaves the signals of an ending job to the rank's own process, which saves and then ends its workers.

    SLURM and terminals signal every process of a job; a worker that died of it would take the rank's save
    along. Only the parent's SIGTERM counts, and a worker whose parent is gone ends by torch's watchdog.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
