"""One rank's micro-batches in the order of ``stream.py``, read and decoded by ``workers.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Sample
from dehvf_ds.config import DataConfig, UserError
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.examples import Examples
from dehvf_ds.data.images import build_augment
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.samples import PADDING_ROW, SampleReader, read_sample
from dehvf_ds.data.stream import Bucketing, SampleOrder, micro_batches
from dehvf_ds.data.transforms import ImageTransform
from dehvf_ds.data.workers import TrainingLoader, build_torch_loader


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
    index.check_task(config.task)
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
    # A random crop shows a part of the picture at the tower's size.
    shorter_side = round(image_transform.image_size / config.augment.min_crop**0.5)
    return build_torch_loader(
        SampleReader(index, examples, shorter_side, task=config.task, replace_bad=config.on_bad == "replace"),
        _build_collator(config, tokenizer, image_transform, build_augment(config.augment, seed=seed)),
        lambda: micro_batches(
            order,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            start_sample=start_sample,
            num_steps=num_steps,
        ),
        num_batches=num_steps * accumulation,
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
    iterated again and again; ``start`` it before the training.

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
    return build_torch_loader(
        SampleReader(index, examples, image_transform.image_size, task=config.task, replace_bad=False),
        _build_collator(config, tokenizer, image_transform, None),
        lambda: iter(batches),
        num_batches=len(batches),
        num_workers=min(config.num_workers, 1),
        seed=0,
        again=True,
    )


def _build_collator(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_transform: ImageTransform,
    augment: Callable[[Image.Image, Sample], Image.Image] | None,
) -> Collator:
    return Collator(
        tokenizer,
        image_transform,
        task=config.task,
        max_tokens=config.max_tokens,
        prompt=config.prompt,
        scienceqa=config.scienceqa,
        augment=augment,
    )
