"""A run's numbers: one JSON object per step, experiment trackers, and the console."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from dehvf_ds.atomic import atomic_file
from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.distributed import World, gather_to_main
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.flops import StepFlops
from dehvf_ds.training.run_dir import METRICS_FILE
from dehvf_ds.training.step import StepResult, StopRequest
from dehvf_ds.training.zero import gather_trainables

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


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

_OCCASIONAL = (("val/loss", "val", 4), ("eval/CIDEr", "CIDEr", 1), ("eval/accuracy", "accuracy", 2))
"""What the console shows in the steps that have it: name, label, digits."""

TRACKERS_FILE = "trackers.json"
"""By tracker, the id under which a resumed run continues the same tracked run."""

_RUN_NAME = {"wandb": "name", "swanlab": "experiment_name"}
"""By tracker, the argument that takes the run's name."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An in-training evaluation's results.

    The highest ``score`` decides which checkpoint is the best; ``numbers`` go to the metrics; ``sheet`` is a
    PNG of example pictures with their answers, None where it could not be drawn.
    """

    score: float | None
    numbers: dict[str, float]
    sheet: Path | None


class Evaluation(Protocol):
    """An in-training evaluation; every rank must call it."""

    def open(self) -> None:
        """Refuses before the first step what could not be scored."""
        ...

    def __call__(
        self, model: DehvfForConditionalGeneration, step: int, stop: StopRequest
    ) -> Evaluated | None:
        """Evaluates the current weights; None if it was stopped early or could not be scored."""
        ...


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_flops for kind, gpu in GPUS.items() if kind.partition("-")[0] in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_speed(result: StepResult, seconds: float, flops: StepFlops, world: World) -> Metrics:
    """Rows and text tokens per second, shares of the device's peak if that is known, peak memory.

    ``mfu`` counts ``StepFlops.model`` and ``hfu`` ``StepFlops.hardware``, both averaged over the ranks.
    """
    counts, peak = result.counts, peak_flops(world.device)
    computed = {"mfu": flops.model(counts.num_text_tokens), "hfu": flops.hardware(counts)}
    return {
        "samples_per_s": counts.num_rows / seconds,
        "tokens_per_s": counts.num_text_tokens / seconds,
        "padding_share": result.padding_share,
        **{
            name: None if peak is None else value / seconds / world.size / peak
            for name, value in computed.items()
        },
        "memory_bytes": peak_memory_bytes(world.device),
    }


def router_metrics(
    model: DehvfForConditionalGeneration, weights: Float[Tensor, "layers feature_layers"] | None
) -> dict[str, float]:
    """Router weights (a mean over pictures; None leaves them out) and branch scales. All ranks must call it.

    ``router/mean/BLOCK``: mean weight of a feature layer over the decoder's layers; ``router/entropy/LAYER``:
    in nats, from 0 (one feature layer alone) to log of their number; ``visual/scale/LAYER``: Frobenius norm
    of diag(b_l) W_o, zero at the start. Ours.
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
    """Damaged samples for which others were substituted: prints the first of them, counts all by shard."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._counts: Counter[str] = Counter()

    def add(self, micro_batches: Sequence[Batch]) -> None:
        """Counts the batches' damaged samples."""
        for shard, message in (damage for batch in micro_batches for damage in batch.substituted):
            if self._counts.total() < MAX_SUBSTITUTION_LINES:
                print(f"substituted a damaged sample: {message}", file=sys.stderr, flush=True)
            self._counts[shard] += 1

    def by_shard(self) -> str:
        """The shards with the most, over all ranks, on rank 0. Every rank must call it."""
        total: Counter[str] = Counter()
        for shard, count in gather_to_main(list(self._counts.items()), self._world):
            total[shard] += count
        return ", ".join(f"{shard} {count}" for shard, count in total.most_common(8))


class MetricsWriter:
    """Writes a run's numbers to ``metrics.jsonl``, the trackers and the console. Only rank 0 has one.

    Lines of steps after ``start_step``, from which a run resumes, are removed.
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Trackers,
        *,
        num_steps: int,
        log_every: int,
        start_step: int = 0,
    ) -> None:
        path = run_dir / METRICS_FILE
        _cut(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers
        self._start_step, self._num_steps, self._log_every = start_step, num_steps, log_every
        self._elapsed_s = 0.0
        self._bar, console = None, Console(file=sys.stdout)
        if console.is_terminal:
            text = "{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"
            text += "  {task.fields[speed]:.1f} samples/s"
            self._bar = Bar(BarColumn(), TextColumn(text), TimeRemainingColumn(), console=console)
            fields = {"completed": start_step, "loss": math.nan, "speed": 0.0}
            self._task = self._bar.add_task("train", total=num_steps, **fields)
            self._bar.start()

    def write(self, metrics: Metrics) -> None:
        """Writes the numbers of one step."""
        # NaN is not JSON: a loss that is not finite is null.
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        values = {name: value for name, value in metrics.items() if value is not None}
        step, loss, speed = int(values.pop("step")), values["train/loss"], values["samples_per_s"]
        self._trackers.log(values, step)
        self._elapsed_s += values["seconds"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        elif step % self._log_every == 0 or step in (1, self._num_steps):
            left_s = self._elapsed_s / (step - self._start_step) * (self._num_steps - step)
            found = [(label, values[name], digits) for name, label, digits in _OCCASIONAL if name in values]
            occasional = "".join(f"  {label} {value:.{digits}f}" for label, value, digits in found)
            print(
                f"step {step}/{self._num_steps}  loss {loss:.4f}  lr {values['lr']:.2e}  "
                f"{speed:.1f} samples/s  {left_s / 60:.1f} min left{occasional}",
                flush=True,
            )

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Logs a PNG to the trackers."""
        self._trackers.log_picture(name, path, step)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._trackers.close()


def _cut(path: Path, last_step: int) -> None:
    """Removes the lines of steps after ``last_step``, and one that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


# --- experiment trackers ---


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers: no {name}; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise UserError(f"train.trackers: {name} is not installed here; pip install {name}")


class Trackers:
    """accelerate's trackers. One that fails is reported and left out from then on; the run continues.

    TensorBoard, wandb, swanlab and mlflow continue the tracked run of a run that resumes at ``start_step``
    (their ids are in the run directory); others begin a new one. ``settings`` are the run's by dotted name.
    """

    def __init__(
        self, names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], start_step: int
    ) -> None:
        self._id_file = run_dir / TRACKERS_FILE
        self._ids: dict[str, str] = {}
        if start_step and self._id_file.is_file():
            # A damaged file costs the link to the earlier part, not the run.
            with suppress(OSError, ValueError):
                self._ids = dict(json.loads(self._id_file.read_text(encoding="utf-8")))
        self._open: dict[str, GeneralTracker] = {}
        for name in names:
            self._attempt(name, lambda name=name: self._start(name, run_dir, settings, start_step))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Logs a PNG, where a tracker takes pictures."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))

        from accelerate.tracking import TensorBoardTracker

        def log(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: pixels[None]}, step, dataformats="NHWC")  # pyright: ignore
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step)  # pyright: ignore

        self._each(log)

    def close(self) -> None:
        """Writes what they have buffered, and ends them."""
        self._each(lambda tracker: tracker.finish())

    def _start(self, name: str, run_dir: Path, settings: Mapping[str, Any], start_step: int) -> None:
        from accelerate import tracking

        # Its own logger needs accelerate's process state, which this run does not have.
        tracking.logger = logging.getLogger("accelerate.tracking")
        create: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        run_name = run_dir.resolve().name
        if name == "tensorboard":
            tracker = create(name, run_dir, purge_step=start_step + 1)
        elif name in ("wandb", "swanlab"):
            own_id = self._ids.setdefault(name, uuid.uuid4().hex[:16])
            tracker = create("dehvf_ds", id=own_id, resume="allow", **{_RUN_NAME[name]: run_name})
        elif name == "mlflow":
            tracker = create("dehvf_ds", run_name=run_name, run_id=self._ids.get(name))
        else:
            tracker = create(*[run_name, run_dir][: 1 + create.requires_logging_directory])
        tracker.main_process_only = False
        tracker.start()
        if name == "mlflow":
            self._ids[name] = tracker.active_run.info.run_id
        if name != "tensorboard" and not start_step:
            tracker.store_init_configuration(dict(settings))
        if self._ids:
            with atomic_file(self._id_file) as part:
                part.write_text(json.dumps(self._ids), encoding="utf-8")
        self._open[name] = tracker

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: act(tracker))

    def _attempt(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        # Whatever a tracker's client raises (its server is gone, its disk full), the run continues.
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            line = f"warning: train.trackers: {name} is disabled for the rest of this run: {reason}"
            print(line, file=sys.stderr, flush=True)
