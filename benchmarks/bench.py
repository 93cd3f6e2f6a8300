"""What the benchmarks share: flags, a run's configuration, random captions, and calls timed in turn."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig

if not torch.cuda.is_available():
    # Otherwise DeepSpeed says among the results that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

REPOSITORY = Path(__file__).resolve().parent.parent
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


def flags(doc: str | None, *, backbones: bool = False) -> argparse.ArgumentParser:
    """A parser described by a docstring's first line; with ``backbones`` it takes those of the demo."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if backbones:
        parser.add_argument("--language-model", default="demo_data/backbones/smollm2-135m")
        parser.add_argument("--vision-tower", default="demo_data/backbones/dinov2-small")
    return parser


def run_config(
    rows: int,
    *,
    accumulation: int = 1,
    run_dir: str = "unused",
    language_model: str = "unused",
    vision_tower: str = "unused",
    checkpointing: bool = False,
    **model: Any,
) -> RunConfig:
    """A run's configuration for an engine alone: of its micro-batches' rows and, beyond that, its model."""
    sizes = {"global_batch_size": rows * accumulation, "micro_batch_size": rows}
    return RunConfig(
        run_dir=run_dir,
        model=ModelConfig(language_model=language_model, vision_tower=vision_tower, **model),
        data=DataConfig(train="unused"),
        train=TrainConfig(**sizes, activation_checkpointing=checkpointing),
    )


def random_batch(
    rows: int,
    tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    prompt_tokens: int = 0,
    vocab: int = 1000,
    image_size: int = 224,
    pictures: bool = True,
    together: int = 1,
    seed: int = 0,
) -> Batch:
    """Captions of random tokens with pictures of noise, fp32; rows are supervised but for the prompt.

    ``together`` neighbouring rows share a picture.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocab, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths or [tokens] * rows)[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, :prompt_tokens] = IGNORE_INDEX
    picture = torch.randn(1, 3, image_size, image_size, generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        pixel_values=picture.expand(-(-rows // together), -1, -1, -1).contiguous(),
        picture=torch.arange(rows) // together if together > 1 else None,
        has_image=torch.full((rows,), pictures),
        keys=tuple(map(str, range(rows))),
    )


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

    Yields the seconds of each call of a round; each goes first in turn. ``wait`` is called before and after
    each call: for the device, or for other ranks.
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


def resident_bytes(field: str = "VmRSS") -> int:
    """A memory field of this process as Linux counts it: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """The most memory that the process holds meanwhile, pages of mapped files included, less what it held."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.peak, resident_bytes()) - self.before

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident_bytes())


def saved_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, beside those it was given."""
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        # Detached: a result that is saved with its own graph would never be freed.
        held.append(detached := tensor.detach())  # or another would take its address
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return detached

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    for tensor in [*known, out]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def print_profile(run: Callable[[], object]) -> None:
    """Prints where a call spends its time on the CPU, after one that is not counted."""
    run()
    with torch.profiler.profile() as profile:
        run()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
