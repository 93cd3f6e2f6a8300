"""One rank's micro-batches in the order of ``stream.py``, read and decoded by worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data.chat import parse_conversation
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.examples import Examples
from dehvf_ds.data.images import build_augment, decode_image
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import Task
from dehvf_ds.data.shards import IMAGE_MEMBERS, DamagedSample, names_picture, parse_record
from dehvf_ds.data.stream import Bucketing, SampleOrder, micro_batches
from dehvf_ds.data.transforms import ImageTransform

PREFETCHED_BATCHES = 4
PADDING_ROW = -1
MAX_ATTEMPTS = 16
"""Samples that are tried in a damaged one's place."""


def read_sample(
    index: ShardIndex,
    row: int,
    *,
    epoch: int = 0,
    example: int = 0,
    caption: int | None = None,
    shorter_side: int | None = None,
) -> Sample:
    """Reads and decodes one row.

    Args:
        index: the data set.
        row: the row's number.
        epoch: epoch in which it was drawn.
        example: its number among the epoch's examples.
        caption: number of the caption to learn; it becomes the record's field ``caption``.
        shorter_side: pixels that the transform will keep of the shorter side; lets large JPEGs decode faster.

    Raises:
        DamagedSample: the row is damaged, or lacks a picture that its record names.
    """
    members = index.read(row)
    record = parse_record(members)
    where = f"{members['__url__']} ({members['__key__']})"
    picture = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    if picture is None and names_picture(record):
        raise DamagedSample(
            f"{where}: its record names a picture, but the shard holds none; build the shards again"
        )
    try:
        image = None if picture is None else decode_image(picture, shorter_side=shorter_side)
    except ValueError as error:
        raise DamagedSample(f"{where}: {error}; repair the picture and build the shards again") from error
    if caption is not None:
        record["caption"] = record["captions"][caption]
    return Sample(key=members["__key__"], image=image, record=record, epoch=epoch, example=example)


def read_all(index: ShardIndex, *, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
    """Yields a rank's share of all rows for evaluation, in stored order: rank, rank + world_size, ..."""
    for row in range(rank, len(index), world_size):
        yield read_sample(index, row)


def open_examples(config: DataConfig, *, seed: int) -> tuple[ShardIndex, Examples]:
    """Opens the training shards and counts what an epoch goes through (``len`` of the second).

    Raises:
        UserError: the directory is unusable or holds rows of another task.
    """
    index = ShardIndex.of_training(config)
    if config.task == "caption" and index.num_without_captions:
        row = int(np.argmin(index.captions))
        raise UserError(
            f"data.train {config.train}: sample {row} has no caption, as data.task caption needs; "
            "set data.task to the shards' own task, or data.train to caption shards"
        )
    if config.task != "caption" and index.num_without_captions < len(index):
        raise UserError(
            f"data.train {config.train}: holds captions, not rows as data.task {config.task} needs"
        )
    examples = Examples(
        index.captions,
        index.shard_rows,
        index.shard_examples,
        index.text_lengths,
        mode=config.captions,
        seed=seed,
    )
    return index, examples


def epoch_samples(config: DataConfig, num_examples: int, global_batch_size: int) -> int:
    """Samples that an epoch consumes: all, or with ``tail: drop`` those that fill its batches.

    Raises:
        UserError: they do not fill one batch.
    """
    if config.tail == "wrap":
        return num_examples
    if num_examples < global_batch_size:
        raise UserError(
            f"data.tail drop: the {num_examples} samples of {config.train} do not fill one batch of "
            f"train.global_batch_size {global_batch_size}"
        )
    return num_examples // global_batch_size * global_batch_size


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
    start_sample: int,
    num_steps: int,
) -> TrainingLoader:
    """Builds one rank's loader of ``num_steps * accumulation`` micro-batches.

    The order is drawn in this process, so the number of workers changes nothing but the speed. The state
    to resume from is the number of samples that all ranks have consumed.

    Args:
        config: shards, task and workers.
        tokenizer: the LLM's tokenizer.
        image_transform: the tower's transform.
        seed: seed of the order, of the choice of captions and of augmentation.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: rows of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        start_sample: samples consumed before, by all ranks.
        num_steps: optimizer steps to deliver.

    Raises:
        UserError: the shards or the tokenizer are unusable. In iteration: a damaged sample, in one line, when
            ``config.on_bad`` is ``raise`` or no other sample of its shard can be read either.
    """
    index, examples = open_examples(config, seed=seed)
    global_batch_size = micro_batch_size * accumulation * world_size
    bucketing = None
    if config.bucket_steps:
        bucketing = Bucketing(
            steps=config.bucket_steps, global_batch_size=global_batch_size, lengths=examples.lengths
        )
    order = SampleOrder(
        examples.shard_sizes,
        seed=seed,
        window=config.shuffle_window,
        epoch_length=epoch_samples(config, len(examples), global_batch_size),
        bucketing=bucketing,
    )
    collator = Collator(
        tokenizer,
        image_transform,
        task=config.task,
        max_tokens=config.max_tokens,
        prompt=config.prompt,
        scienceqa=config.scienceqa,
        augment=build_augment(config.augment, seed=seed),
    )
    # A random crop shows a part of the picture at the tower's size.
    shorter_side = round(image_transform.image_size / config.augment.min_crop**0.5)
    return _build_torch_loader(
        _Rows(index, examples, shorter_side, task=config.task, replace_bad=config.on_bad == "replace"),
        _MicroBatches(
            lambda: micro_batches(
                order,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                start_sample=start_sample,
                num_steps=num_steps,
            ),
            num_steps * accumulation,
        ),
        collator,
        num_workers=config.num_workers,
        seed=seed,
    )


def build_validation_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_transform: ImageTransform,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> TrainingLoader:
    """Builds one rank's loader of the validation rows, in stored order; every caption is one.

    Every rank gets equally many micro-batches: where the rows do not fill them, rows without anything
    supervised follow, so that the summed loss and token count are those of the rows alone. It can be
    iterated again and again.

    Args:
        config: ``val`` and ``val_samples`` among the rest.
        tokenizer: the LLM's tokenizer.
        image_transform: the tower's transform.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: rows of a micro-batch.

    Raises:
        UserError: the shards are unusable or hold rows of another task.
    """
    assert config.val is not None
    config = replace(config, train=config.val, location=None, captions="all")
    index, examples = open_examples(config, seed=0)
    num_rows = min(len(examples), config.val_samples or len(examples))
    num_batches = -(-num_rows // (micro_batch_size * world_size))
    own = range(rank, num_batches * micro_batch_size * world_size, world_size)
    drawn = [(0, row if row < num_rows else PADDING_ROW) for row in own]
    batches = [drawn[i : i + micro_batch_size] for i in range(0, len(drawn), micro_batch_size)]
    collator = Collator(
        tokenizer,
        image_transform,
        task=config.task,
        max_tokens=config.max_tokens,
        prompt=config.prompt,
        scienceqa=config.scienceqa,
    )
    return _build_torch_loader(
        _Rows(index, examples, image_transform.image_size, task=config.task, replace_bad=False),
        _MicroBatches(lambda: iter(batches), len(batches)),
        collator,
        num_workers=min(config.num_workers, 1),
        seed=0,
    )


def _build_torch_loader(
    rows: Dataset, batches: _MicroBatches, collator: Collator, *, num_workers: int, seed: int
) -> TrainingLoader:
    if num_workers:
        # Workers are forked after the tokenizer has run; without this it prints a warning in each.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TrainingLoader(
        rows,
        batch_sampler=batches,
        collate_fn=_OrError(collator),
        num_workers=num_workers,
        # Forked workers share the maps of the index; started anew they would each open it.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_init_worker,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        # Its own generator: an iteration must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )


class TrainingLoader(DataLoader):
    """A DataLoader of ``Batch`` whose workers hand a ``UserError`` over as one line, without a traceback."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields the micro-batches in order; raises the ``UserError`` of the first unusable sample."""
        batches = super().__iter__()
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise UserError(str(batch))
                yield batch
        finally:
            # The last reference: workers end here, not in a garbage collection that waits 5 s for each.
            del batches


@dataclass(frozen=True)
class _Drawn:
    """A sample as it was drawn, or the one in its place with what was wrong: (shard, message)."""

    sample: Sample
    damage: tuple[str, str] | None = None
    is_padding: bool = False


class _Rows(Dataset):
    """Examples by (epoch, number). A ``UserError`` is returned, for a worker's raise would wrap it."""

    def __init__(
        self, index: ShardIndex, examples: Examples, shorter_side: int, *, task: Task, replace_bad: bool
    ):
        self._task = task
        self._index = index
        self._examples = examples
        self._shorter_side = shorter_side
        self._replace_bad = replace_bad

    def __getitem__(self, drawn: tuple[int, int]) -> _Drawn | UserError:
        epoch, example = drawn
        try:
            if example == PADDING_ROW:
                return _Drawn(self._read(epoch, 0), is_padding=True)
            return _Drawn(self._read(epoch, example))
        except DamagedSample as error:
            return self._read_other(epoch, example, error) if self._replace_bad else UserError(str(error))
        except UserError as error:
            return UserError(str(error))

    def _read(self, epoch: int, example: int) -> Sample:
        row, caption = self._examples.resolve(epoch, example)
        sample = read_sample(
            self._index,
            row,
            epoch=epoch,
            example=example,
            caption=caption,
            shorter_side=self._shorter_side,
        )
        if self._task == "chat":
            try:
                parse_conversation(sample.record)
            except UserError as error:
                where = f"{self._index.directory}: sample {row} ({sample.key})"
                raise DamagedSample(f"{where}: {error}") from None
        return sample

    def _read_other(self, epoch: int, example: int, damage: DamagedSample) -> _Drawn | UserError:
        row, _ = self._examples.resolve(epoch, example)
        shard = self._index.locate(row)[0]
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                other = self._examples.alternative(example, attempt)
                return _Drawn(self._read(epoch, other), (shard, str(damage)))
            except DamagedSample:
                continue
            except (UserError, IndexError):
                break
        return UserError(f"{damage} (nor could {MAX_ATTEMPTS - 1} others of its shard take its place)")


class _OrError:
    """Collates, or passes the first error among the samples on."""

    def __init__(self, collator: Collator):
        self._collator = collator

    def __call__(self, rows: Sequence[_Drawn | UserError]) -> Batch | UserError:
        drawn = [row for row in rows if isinstance(row, _Drawn)]
        if len(drawn) < len(rows):
            return next(row for row in rows if isinstance(row, UserError))
        try:
            batch = self._collator([row.sample for row in drawn])
        except UserError as error:
            return UserError(str(error))
        for number, row in enumerate(drawn):
            if row.is_padding:
                batch.labels[number] = IGNORE_INDEX
        return replace(batch, replaced=tuple(row.damage for row in drawn if row.damage))


class _MicroBatches(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, example), drawn anew for every iteration."""

    def __init__(self, draw: Callable[[], Iterator[list[tuple[int, int]]]], length: int):
        self._draw = draw
        self._length = length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._draw()

    def __len__(self) -> int:
        return self._length


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
