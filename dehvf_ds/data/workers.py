"""Worker processes that read and collate micro-batches; they outlive signals, but not their rank."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import JobError, UserError
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.samples import DrawnSample, SampleReader

PREFETCHED_BATCHES = 4


class TrainingLoader(DataLoader):
    """A DataLoader of ``Batch`` whose workers hand a ``UserError`` over as one line, without a traceback."""

    _started: Iterator[Any] | None = None

    def start(self) -> None:
        """Forks the workers, which begin to read the first iteration; without workers it does nothing.

        To be called before the backends start and the model is built: a process forked while a thread of it
        makes or ends a Python thread state hangs in CPython's own clean-up for ever (seen with 3.11, at a
        validation's start), and CUDA's, NCCL's and gloo's threads are no better to fork beside.
        """
        if self.num_workers:
            self._started = self._fork()

    def __iter__(self) -> Iterator[Batch]:
        """Yields the micro-batches in order.

        Raises:
            UserError: of the first unusable sample.
            JobError: a worker died.
        """
        batches, self._started = self._fork() if self._started is None else self._started, None
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise UserError(str(batch))
                yield batch
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise JobError(
                f"a process that reads data died ({error}); killed for the memory it took, perhaps: "
                "data.num_workers sets how many there are"
            ) from None
        finally:
            # The last reference: workers end here, not in a garbage collection that waits 5 s for each.
            del batches

    def _fork(self):
        # Workers begin with SIGTERM blocked. Blocked later, it would kill by way of a thread that a library
        # started before: one of torch's `set_num_threads` took it in a preempted job.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        on_child = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if threading.current_thread() is threading.main_thread():
                # Torch's raises wherever this process is when a worker dies, in what cleans up after an error
                # too. Who waits for a batch looks after the workers every five seconds.
                signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)


def build_torch_loader(
    reader: SampleReader,
    collator: Collator,
    draw: Callable[[], Iterator[list[tuple[int, int]]]],
    *,
    num_batches: int,
    num_workers: int,
    seed: int,
    again: bool = False,
) -> TrainingLoader:
    """Puts reader and collator to work on micro-batches as they are drawn.

    Args:
        reader: reads one example.
        collator: makes the samples of a micro-batch tensors.
        draw: starts the micro-batches of an iteration, each a list of (epoch, example).
        num_batches: micro-batches of an iteration.
        num_workers: worker processes; with 0 the work is done in this process.
        seed: seed of the loader's own generator.
        again: whether it is iterated more than once; the same workers then serve every iteration.
    """
    if num_workers:
        # Workers are forked after the tokenizer has run; without this it prints a warning in each.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TrainingLoader(
        reader,
        batch_sampler=_MicroBatches(draw, num_batches),
        collate_fn=_OrError(collator),
        num_workers=num_workers,
        # Forked workers share the maps of the index; started anew they would each open it.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_init_worker,
        persistent_workers=again and num_workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        # Its own generator: an iteration must not draw from the one that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )


class _OrError:
    """Collates, or passes the first error among the samples on."""

    def __init__(self, collator: Collator):
        self._collator = collator

    def __call__(self, rows: Sequence[DrawnSample | UserError]) -> Batch | UserError:
        drawn = [row for row in rows if isinstance(row, DrawnSample)]
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
    along. Only the parent's SIGTERM counts (it is blocked in all threads, and one waits for it), and a worker
    whose parent is gone ends by torch's watchdog.
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
