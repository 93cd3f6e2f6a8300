"""What a run tells about itself: one JSON object a step, TensorBoard, and the console."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Dense bf16 FLOP/s of a GPU, from its maker's data sheet.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Numbers of one optimizer step, over all ranks.

    Attributes:
        step: optimizer steps taken, this one included.
        epoch: passes over the data so far.
        samples: rows seen so far.
        tokens: text tokens seen so far.
        loss: cross-entropy a supervised token, in nats.
        grad_norm: global norm of the gradient before clipping; None where it is not finite.
        lr: learning rate of this step.
        seconds: wall time of this step.
        data_seconds: of these, what rank 0 waited for the loader.
        samples_per_s: rows a second in this step.
        tokens_per_s: text tokens a second in this step.
        mfu: model FLOPs utilisation; None where the device's peak is not known.
        memory_bytes: peak memory of rank 0: CUDA's allocator, or the process on a CPU.
        skipped: steps not taken so far because the gradient was not finite.
        unsupervised_rows: rows so far that had no token to learn, their prompt being too long.
        replaced: damaged samples so far in whose place another stood.
        rows_crc: equal in two runs where this step saw the same rows; below 2 ** 24.
    """

    step: int
    epoch: float
    samples: int
    tokens: int
    loss: float
    grad_norm: float | None
    lr: float
    seconds: float
    data_seconds: float
    samples_per_s: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    skipped: int
    unsupervised_rows: int
    replaced: int
    rows_crc: int


# Of what is not measured in every step: name, label on the console, digits.
_TOLD = (("val/loss", "val", 4), ("eval/CIDEr", "CIDEr", 1), ("eval/accuracy", "accuracy", 2))

_JSON_NAMES = {"loss": "train/loss", "grad_norm": "train/grad_norm"}


def model_flops(num_parameters: int, num_tokens: int) -> float:
    """FLOPs of forward and backward through frozen weights: 4 a parameter and token (ours).

    A trained weight costs 6: forward 2, gradient of the activations 2, of the weights 2. Frozen weights
    have no gradient of their own.
    """
    return 4.0 * num_parameters * num_tokens


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Writes a run's numbers. Only rank 0 owns one.

    Args:
        run_dir: ``metrics.jsonl`` and ``tensorboard/`` are written there.
        num_steps: steps of the run, for the bar.
        log_every: steps between plain lines when the console is not a terminal.
        start_step: steps that an earlier part of the run has done; what it wrote of later ones is removed.
    """

    def __init__(self, run_dir: Path, num_steps: int, log_every: int, start_step: int = 0) -> None:
        # Imported late: it takes seconds, and ranks other than 0 do without.
        from torch.utils.tensorboard import SummaryWriter

        keep_lines(run_dir / "metrics.jsonl", start_step)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._start_step = start_step
        self._num_steps = num_steps
        self._log_every = log_every
        console = Console(file=sys.stdout)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
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
        self._elapsed_s = 0.0

    def write(self, metrics: StepMetrics, more: Mapping[str, float] | None = None) -> None:
        """Writes one step everywhere; ``more`` holds what is not measured in every step, by name."""
        values = {_JSON_NAMES.get(k, k): v for k, v in asdict(metrics).items()} | dict(more or {})
        # NaN is not JSON: a loss that is not finite is null.
        self._file.write(json.dumps({k: _finite(v) for k, v in values.items()}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, metrics.step)
        self._elapsed_s += metrics.seconds
        if self._bar is not None:
            self._bar.update(
                self._task, completed=metrics.step, loss=metrics.loss, speed=metrics.samples_per_s
            )
        elif metrics.step % self._log_every == 0 or metrics.step in (1, self._num_steps):
            done = metrics.step - self._start_step
            left_s = self._elapsed_s / done * (self._num_steps - metrics.step)
            validated = "".join(
                f"  {label} {more[name]:.{digits}f}" for name, label, digits in _TOLD if more and name in more
            )
            print(
                f"step {metrics.step}/{self._num_steps}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
                f"{metrics.samples_per_s:.1f} samples/s  {left_s / 60:.1f} min left{validated}",
                flush=True,
            )

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Shows a PNG in TensorBoard."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._tensorboard.close()


def keep_lines(path: Path, last_step: int) -> None:
    """Cuts a metrics file after the line of ``last_step``: a resumed run writes the later ones anew."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line of a killed run may be half a one.
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(kept), encoding="utf-8")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
