"""What the benchmarks share: one way to time calls, and batches of random captions."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.batch import Batch


def wait_for_device() -> None:
    """Waits until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_ups: int = 1,
    wait: Callable[[], None] = wait_for_device,
) -> Iterator[dict[str, float]]:
    """Times calls against each other, so that what else the machine does meets all of them.

    Args:
        runs: what is timed, by name; each goes first in turn.
        rounds: how often each is timed.
        warm_ups: calls of each before that, which are not counted.
        wait: called before and after each call: for the device, or for other ranks.

    Yields:
        The seconds of each call of a round.
    """
    for run in runs.values():
        for _ in range(warm_ups):
            run()
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        seconds = {}
        for name in names[first:] + names[:first]:
            wait()
            started = time.perf_counter()
            runs[name]()
            wait()
            seconds[name] = time.perf_counter() - started
        yield seconds


def median_and_range(values: Sequence[float]) -> str:
    """In words, for ratios."""
    return f"median {statistics.median(values):.3f}, {min(values):.3f} to {max(values):.3f}"


def random_batch(rows: int, tokens: int, *, image_size: int = 224, seed: int = 0) -> Batch:
    """Captions of random tokens, all of one length and supervised, with pictures of noise; fp32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 1000, (rows, tokens), generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        pixel_values=torch.randn(rows, 3, image_size, image_size, generator=generator),
        has_image=torch.ones(rows, dtype=torch.bool),
    )
