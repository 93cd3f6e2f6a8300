"""One rank's micro-batches in the order of ``order.py``, read and collated by worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.config import DataConfig, JobError, UserError
from dehvf_ds.data.collate import Collator, ImageTransform
from dehvf_ds.data.examples import Examples, open_examples, read_sample
from dehvf_ds.data.images import build_augment
from dehvf_ds.data.order import Bucketing, MicroBatches, SampleOrder, Units
from dehvf_ds.data.shards import DamagedSample

MAX_SUBSTITUTES = 15
"""Other samples of its shard that are tried in place of a damaged one."""

PREFETCHED_BATCHES = 4

# Marks a row without labels, which is read from the first example.
_PADDING = -1


class BatchReader(Dataset):
    """Micro-batches by their (epoch, example) pairs. Errors are returned: torch would wrap raised ones."""

    def __init__(
        self,
        examples: Examples,
        collator: Collator,
        *,
        shorter_side: int,
        max_substitutes: int = 0,
        together: int = 1,
    ):
        """Reads nothing yet; ``shorter_side`` as in ``read_sample``, ``together`` the captions of a unit."""
        self._examples = examples
        self._collator = collator
        self._shorter_side = shorter_side
        self._max_substitutes = max_substitutes
        self._together = together

    def __getitem__(self, drawn: Sequence[tuple[int, int]]) -> Batch | UserError | OSError:
        decoded: dict[bytes, Image.Image] = {}
        try:
            rows = [self._read(epoch, max(example, 0), decoded) for epoch, example in drawn]
            batch = self._collator([sample for sample, _ in rows])
        except (UserError, OSError) as error:
            return error
        batch.labels[[example == _PADDING for _, example in drawn]] = IGNORE_INDEX
        return replace(batch, substituted=tuple(damage for _, damage in rows if damage)).with_facts()

    def _read(
        self, epoch: int, example: int, decoded: dict[bytes, Image.Image]
    ) -> tuple[Sample, tuple[str, str] | None]:
        """The sample, or a substitute together with the damaged one's shard and what is wrong with it."""
        try:
            return self._read_one(epoch, example, decoded), None
        except DamagedSample as error:
            if not self._max_substitutes:
                raise
            damage = str(error)
        row, _ = self._examples.resolve(epoch, example)
        shard = self._examples.index.locate(row)[0]
        for other in islice(self._examples.substitutes(example), self._max_substitutes):
            with contextlib.suppress(DamagedSample):
                return self._read_one(epoch, other, decoded), (shard, damage)
        raise UserError(f"{damage} ({self._max_substitutes} other samples of its shard are no better)")

    def _read_one(self, epoch: int, example: int, decoded: dict[bytes, Image.Image]) -> Sample:
        row, caption = self._examples.resolve(epoch, example)
        (leader,) = self._examples.leaders(np.array([example]), self._together)
        return read_sample(
            self._examples.index,
            row,
            epoch=epoch,
            example=int(leader),
            caption=caption,
            shorter_side=self._shorter_side,
            task=self._collator.task,
            decoded=decoded,
        )


class TrainingLoader(DataLoader):
    """A DataLoader of ``Batch`` whose workers survive signals, but not their rank."""

    _started: Iterator[Any] | None = None

    def __init__(
        self,
        reader: BatchReader,
        drawn: MicroBatches | list[list[tuple[int, int]]],
        *,
        num_workers: int,
        again: bool = False,
        pin_memory: bool = False,
    ):
        """``drawn`` is iterated in this process; with ``again`` the same workers serve every iteration.

        ``pin_memory`` puts batches into page-locked memory: the DataLoader's own thread for it would start
        CUDA before the workers are forked.
        """
        self._pins = pin_memory
        if num_workers:
            # Workers are forked after the tokenizer was used; without this each prints a warning.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        super().__init__(
            reader,
            batch_size=None,
            sampler=drawn,
            num_workers=num_workers,
            # Forked workers share the maps of the index; spawned ones would each open it.
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=_init_worker,
            persistent_workers=again and num_workers > 0,
            prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
            # Its own generator: an iteration must not draw from the one used by dropout.
            generator=torch.Generator(),
        )

    def start(self) -> None:
        """Forks the workers, which begin to read the first iteration; without workers it does nothing.

        Call it before the backends start and the model is built: a process forked while another thread
        creates or ends a Python thread state hangs in CPython's clean-up (seen with 3.11, at a validation's
        start), and forking beside the threads of CUDA, NCCL and gloo is no better.
        """
        if self.num_workers:
            self._started = self._fork()

    def __iter__(self) -> Iterator[Batch]:
        """Yields the micro-batches in order; the first unusable sample is a ``UserError``."""
        batches, self._started = self._fork() if self._started is None else self._started, None
        taken = _taken(batches, pins=self._pins, ahead=self.num_workers > 0)
        try:
            for batch in taken:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise JobError(
                f"a process that reads data died ({error}), perhaps for lack of memory: try fewer "
                "data.num_workers"
            ) from None
        finally:
            taken.close()
            # The last reference: workers end here, not in a garbage collection that waits 5 s for each.
            del batches

    def _fork(self):
        # Workers start with SIGTERM blocked. Blocked later, it could still kill them through a thread that a
        # library started before, as torch's `set_num_threads` did in a preempted job.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        on_child = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if threading.current_thread() is threading.main_thread():
                # Torch's handler raises wherever this process is when a worker dies, even in a clean-up after
                # an error. Waiting for a batch checks the workers every five seconds anyway.
                signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)


def _taken(batches: Iterator[Any], *, pins: bool, ahead: bool) -> Generator[Any]:
    """Yields batches, page-locked if ``pins``; with ``ahead`` a thread takes the next one meanwhile.

    A worker hands a batch over in milliseconds, in which this process only waits.
    """
    device = torch.cuda.current_device() if pins else None

    def take() -> Any:
        batch = next(batches, None)
        if pins and isinstance(batch, Batch):
            # A thread begins with the first one, where this rank has no business.
            with torch.cuda.device(device):
                return batch.pin_memory()
        return batch

    if not ahead:
        yield from iter(take, None)
        return
    pool = ThreadPoolExecutor(1, "batches")
    upcoming = pool.submit(take)
    try:
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(take)
            yield batch
    finally:
        # Not for ever: a worker may hang in its file system.
        wait([upcoming], timeout=5)
        pool.shutdown(wait=False, cancel_futures=True)


def epoch_samples(config: DataConfig, num_examples: int, global_batch_size: int) -> int:
    """Samples that an epoch consumes: all, or with ``tail: drop`` those that fill batches."""
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
    examples: Examples,
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
    pin_memory: bool = False,
) -> TrainingLoader:
    """Builds one rank's loader of ``num_steps * accumulation`` micro-batches.

    ``start_sample``, the samples that all ranks have consumed, is all the state to resume from. ``seed`` is
    that of the order and of augmentation; ``pin_memory`` as in ``TrainingLoader``.
    """
    global_batch_size = micro_batch_size * accumulation * world_size
    together = config.captions_together
    bucketing = Bucketing(config.bucket_steps, global_batch_size, examples.lengths)
    order = SampleOrder(
        examples.shard_sizes,
        seed=seed,
        window=config.shuffle_window,
        epoch_length=epoch_samples(config, len(examples), global_batch_size),
        bucketing=bucketing if config.bucket_steps else None,
        units=Units(together, partial(examples.leaders, size=together)) if together > 1 else None,
    )
    drawn = MicroBatches(
        order=order,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        start_sample=start_sample,
        num_steps=num_steps,
    )
    collator = replace(
        _build_collator(config, tokenizer, image_transform), augment=build_augment(config.augment, seed=seed)
    )
    # A random crop is part of a picture, and that part is resized to the tower's size.
    side = round(image_transform.image_size / config.augment.min_crop**0.5)
    max_substitutes = MAX_SUBSTITUTES if config.on_bad == "substitute" else 0
    limits = {"shorter_side": side, "max_substitutes": max_substitutes, "together": together}
    reader = BatchReader(examples, collator, **limits)
    return TrainingLoader(reader, drawn, num_workers=config.num_workers, pin_memory=pin_memory)


def open_validation(config: DataConfig) -> Examples | None:
    """Opens the validation shards, every caption being an example; None if there are none."""
    if config.val is None:
        return None
    return open_examples(replace(config, train=config.val, location=None, captions="all"), seed=0)


def build_validation_loader(
    config: DataConfig,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    image_transform: ImageTransform,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> TrainingLoader:
    """Builds one rank's loader of the first ``val_samples`` validation examples, in stored order.

    Every rank gets the same number of micro-batches; rows without labels fill them up, so that the summed
    loss and token count are those of the examples. It can be iterated repeatedly; ``start`` it before the
    training.
    """
    num_rows = min(len(examples), config.val_samples or len(examples))
    num_batches = -(-num_rows // (micro_batch_size * world_size))
    own = range(rank, num_batches * micro_batch_size * world_size, world_size)
    rows = [(0, row if row < num_rows else _PADDING) for row in own]
    drawn = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    collator = _build_collator(config, tokenizer, image_transform)
    reader = BatchReader(examples, collator, shorter_side=collator.image_size)
    return TrainingLoader(reader, drawn, num_workers=min(config.num_workers, 1), again=True)


def _build_collator(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, image_transform: ImageTransform
) -> Collator:
    return Collator(
        tokenizer,
        image_transform,
        task=config.task,
        max_tokens=config.max_tokens,
        prompt=config.prompt,
        scienceqa=config.scienceqa,
    )


def _init_worker(worker_id: int) -> None:
    """Leaves the signals of an ending job to the rank's own process, which saves and then ends its workers.

    SLURM and terminals signal every process of a job; a worker that died of it would prevent the rank's save.
    Only the parent's SIGTERM counts (it is blocked in all threads, and one waits for it); torch's watchdog
    ends a worker whose parent is gone.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
