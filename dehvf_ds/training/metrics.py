"""What a run tells about itself: one JSON object per step, experiment trackers, and the console."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from dehvf_ds.batch import Batch
from dehvf_ds.distributed import World, gather_to_main
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.optimizer_state import gather_trainables
from dehvf_ds.training.step import StepResult
from dehvf_ds.training.stop import StopRequest
from dehvf_ds.training.trackers import Trackers


class Gpu(NamedTuple):
    """A kind of GPU, from its maker's data sheet."""

    peak_flops: float
    """dense, bf16, per second"""
    memory_gib: float | None
    """as CUDA reports it, rounded; None for no limit"""
    gpu_gb_s: float
    """between GPUs of a node, GB/s per GPU and direction"""
    host_gb_s: float
    """between GPU and host, likewise"""


GPUS = {
    "H100-80G": Gpu(989e12, 79, 450, 64),
    "H200-141G": Gpu(989e12, 140, 450, 64),
    "A100-80G": Gpu(312e12, 79, 300, 32),
    "A100-40G": Gpu(312e12, 39, 300, 32),
    "B200-192G": Gpu(2250e12, 178, 900, 64),
    "L40S-48G": Gpu(362e12, 44, 32, 32),
    "cpu": Gpu(1e11, None, 10, 10),
}

MAX_SUBSTITUTION_LINES = 20


Metrics = dict[str, float | None]
"""Numbers of one optimizer step by name (docs/training.md lists them); None for what is not finite."""

# Of what is not measured in every step: name, label on the console, digits.
_OCCASIONAL = (("val/loss", "val", 4), ("eval/CIDEr", "CIDEr", 1), ("eval/accuracy", "accuracy", 2))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an in-training evaluation found.

    Attributes:
        score: decides which checkpoint is the best, the higher the better; None where there is none.
        numbers: for the metrics, by name.
        sheet: a PNG of example pictures with their answers; None where it could not be drawn.
    """

    score: float | None
    numbers: dict[str, float]
    sheet: Path | None


class Evaluation(Protocol):
    """An in-training evaluation; every rank must call it."""

    def open(self) -> None:
        """Finds before the first step what could not be scored."""
        ...

    def __call__(
        self, model: DehvfForConditionalGeneration, step: int, stop: StopRequest
    ) -> Evaluated | None:
        """Evaluates the weights as they are; None where it was ended early or could not be scored."""
        ...


def model_flops(num_parameters: int, num_tokens: int) -> float:
    """FLOPs of forward and backward through frozen weights: 4 per parameter and token (ours).

    A trained weight costs 6: forward 2, gradient of the activations 2, of the weights 2. Frozen weights
    have no gradient of their own.
    """
    return 4.0 * num_parameters * num_tokens


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_flops for kind, gpu in GPUS.items() if kind.partition("-")[0] in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_speed(
    result: StepResult, seconds: float, batch_size: int, num_parameters: int, world: World
) -> Metrics:
    """Rows and text tokens per second, model FLOPs utilisation if the device's peak is known, peak memory.

    ``batch_size`` is over all ranks; ``num_parameters`` are the decoder's.
    """
    peak = peak_flops(world.device)
    flops = model_flops(num_parameters, result.num_tokens) / seconds / world.size
    return {
        "samples_per_s": batch_size / seconds,
        "tokens_per_s": result.num_tokens / seconds,
        "mfu": None if peak is None else flops / peak,
        "memory_bytes": peak_memory_bytes(world.device),
    }


def router_metrics(
    model: DehvfForConditionalGeneration, weights: Float[Tensor, "layers feature_layers"] | None
) -> dict[str, float]:
    """Router weights and branch scales by name. Every rank must call it.

    ``router/mean/BLOCK``: mean weight of a feature layer over the decoder's layers; ``router/entropy/LAYER``:
    in nats, from 0 (one feature layer alone) to log of their number; ``visual/scale/LAYER``: Frobenius norm
    of diag(b_l) W_o, zero at the start. Ours. ``weights`` are averaged over some pictures; None leaves theirs
    out.
    """
    found = {}
    if weights is not None:
        weights = weights.float().cpu()
        blocks, means = model.config.feature_layers, weights.mean(dim=0).tolist()
        found |= {f"router/mean/{block:02d}": mean for block, mean in zip(blocks, means, strict=True)}
        entropies = torch.special.entr(weights).sum(dim=1).tolist()
        found |= {f"router/entropy/{layer:02d}": entropy for layer, entropy in enumerate(entropies)}
    scales = {
        name: parameter
        for name, parameter in model.trainable_parameters().items()
        if name.endswith(("scale_out", "reader.w_out"))
    }
    if scales:
        values = gather_trainables(scales)
        row_norms = values.pop("reader.w_out").norm(dim=1)
        for name, scale in values.items():
            layer = next(part for part in name.split(".") if part.isdigit())
            found[f"visual/scale/{int(layer):02d}"] = (scale * row_norms).norm().item()
    return found


class SubstitutionLog:
    """Damaged samples for which others were substituted: a line for each of the first, counts by shard."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._counts: Counter[str] = Counter()

    def add(self, micro_batches: Sequence[Batch]) -> None:
        """Counts the batches' damaged samples and prints what was wrong with them."""
        for shard, message in (damage for batch in micro_batches for damage in batch.substituted):
            if self._counts.total() < MAX_SUBSTITUTION_LINES:
                print(f"substituted a damaged sample: {message}", file=sys.stderr, flush=True)
            self._counts[shard] += 1

    def by_shard(self) -> str:
        """The shards with the most of them over all ranks; every rank must call it."""
        total: Counter[str] = Counter()
        for shard, count in gather_to_main(list(self._counts.items()), self._world):
            total[shard] += count
        return ", ".join(f"{shard} {count}" for shard, count in total.most_common(8))


class MetricsWriter:
    """Writes a run's numbers to ``metrics.jsonl``, the trackers and the console. Only rank 0 has one.

    ``start_step`` is how many steps an earlier start of the run has done; lines of later ones are removed.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        log_every: int,
        start_step: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        keep_lines(run_dir / "metrics.jsonl", start_step)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._trackers = trackers
        self._start_step, self._num_steps, self._log_every = start_step, num_steps, log_every
        self._elapsed_s = 0.0
        console = Console(file=sys.stdout)
        self._bar = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.1f} samples/s"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(
                "train", total=num_steps, completed=start_step, loss=float("nan"), speed=0.0
            )
            self._bar.start()

    def write(self, metrics: Metrics) -> None:
        """Writes one step everywhere."""
        # NaN is not JSON: a loss that is not finite is null.
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        values = {name: value for name, value in metrics.items() if value is not None}
        step, loss, speed = int(values.pop("step")), values["train/loss"], values["samples_per_s"]
        if self._trackers is not None:
            self._trackers.log(values, step)
        self._elapsed_s += values["seconds"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        elif step % self._log_every == 0 or step in (1, self._num_steps):
            left_s = self._elapsed_s / (step - self._start_step) * (self._num_steps - step)
            occasional = "".join(
                f"  {label} {values[name]:.{digits}f}"
                for name, label, digits in _OCCASIONAL
                if name in values
            )
            print(
                f"step {step}/{self._num_steps}  loss {loss:.4f}  lr {values['lr']:.2e}  "
                f"{speed:.1f} samples/s  {left_s / 60:.1f} min left{occasional}",
                flush=True,
            )

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Shows a PNG in the trackers."""
        if self._trackers is not None:
            self._trackers.log_picture(name, path, step)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def keep_lines(path: Path, last_step: int) -> None:
    """Cuts a metrics file after the line of ``last_step``: a resumed run writes the later ones anew."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line of a killed run may be cut short.
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(kept), encoding="utf-8")
