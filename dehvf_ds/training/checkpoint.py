"""Checkpoints and the adapter of a run: written, found, verified, loaded.

checkpoints/step_00000100/
  state.safetensors   fp32 master values and moments of the trainables, independent of the number of ranks
  state.json          the run's progress, its configuration, size and hash of the files
  adapter/            the adapter of that step
checkpoints/latest    the name of the newest; moved last
checkpoints/best      the name of the one with the highest score; without scores, the lowest validation loss

Random numbers are functions of (seed, step, micro-step, rank) and of (seed, epoch, sample): none are saved.
The frozen weights are not saved either; their fingerprint is, in the adapter's manifest.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dehvf_ds.atomic import atomic_directory, atomic_file, part_of, sha256_of
from dehvf_ds.config import JobError, RunConfig, UserError, to_plain
from dehvf_ds.distributed import World, on_main
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import read_manifest, save_adapter
from dehvf_ds.training.step import StepResult
from dehvf_ds.training.zero import MASTER, gather_state, gather_trainables, load_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CHECKPOINT_FORMAT = 3
STATE_FILE = "state.safetensors"
INFO_FILE = "state.json"
LATEST, BEST = "latest", "best"


class SavingError(JobError):
    """Too many checkpoints in a row could not be written, so further steps could be lost."""

    code = 74


@dataclass
class Progress:
    """How far a run is, counted over all ranks.

    Attributes:
        step: optimizer steps, including those skipped for a gradient that was not finite.
        samples: rows consumed.
        tokens: text tokens seen.
        skipped: steps that were skipped.
        skipped_in_a_row: how many of them since the last step that was taken.
        unsupervised_rows: rows without a token to learn.
        substituted: damaged samples for which others were substituted.
        best_loss: lowest validation loss so far.
        best_score: highest score of the in-training evaluations so far.
        best_step: step of the highest score; where nothing is scored, of the lowest validation loss.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    unsupervised_rows: int = 0
    substituted: int = 0
    best_loss: float | None = None
    best_score: float | None = None
    best_step: int | None = None

    def count(self, result: StepResult, batch_size: int, *, taken: bool) -> None:
        """Counts a step, ``taken`` or skipped."""
        self.step += 1
        self.samples += batch_size
        self.tokens += result.counts.num_text_tokens
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        self.unsupervised_rows += result.counts.num_unsupervised_rows
        self.substituted += result.num_substituted

    def note_loss(self, loss: float, *, decides: bool) -> None:
        """Notes a validation loss; the lowest ``decides`` on the best step where nothing is scored."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss = loss
            self.best_step = self.step if decides else self.best_step

    def note_score(self, score: float | None) -> None:
        """Notes an evaluation's score; the highest decides on the best step."""
        if (
            score is not None
            and math.isfinite(score)
            and (self.best_score is None or score > self.best_score)
        ):
            self.best_score, self.best_step = score, self.step


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk. ``data_digest`` identifies the training shards."""

    path: Path
    progress: Progress
    optimizer_steps: int
    config: dict[str, Any]
    data_digest: str


@dataclass
class Checkpoints:
    """Writes checkpoints and the adapter, and loads them into the engine. Every rank calls its methods."""

    config: RunConfig
    world: World
    model: DehvfForConditionalGeneration
    engine: DeepSpeedEngine
    dtype: torch.dtype
    data_digest: str
    failures: int = 0
    """Checkpoints in a row that could not be written."""

    def save(self, progress: Progress, *, last: bool) -> None:
        """Writes a checkpoint of this step.

        A full disk or a missing permission leaves earlier checkpoints intact and is only reported; after
        ``train.max_failed_saves`` in a row it is a SavingError, unless the run ends (``last``) anyway.
        """
        tensors, optimizer_steps = gather_state(self.engine, self.model.trainable_parameters())

        def write() -> str:
            try:
                self._write(progress, tensors, optimizer_steps)
            except (OSError, SafetensorError, ModelError) as error:
                return " ".join(str(error).split()) or type(error).__name__
            return ""

        failure = on_main(self.world, write)
        if failure and self.world.is_main:
            message = f"checkpoint of step {progress.step} not written: {failure}; the run goes on"
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self.failures = self.failures + 1 if failure else 0
        if self.failures >= self.config.train.max_failed_saves and not last:
            raise SavingError(
                f"{self.failures} checkpoints in a row could not be written; stopped at step "
                f"{progress.step}; the same command continues from the last one written"
            )

    def save_adapter(self, progress: Progress) -> None:
        """Writes the run's adapter. On a UserError (disk, values that are not finite) the old one is kept."""
        tensors = gather_trainables(self.model.trainable_parameters())
        directory = Path(self.config.run_dir) / "adapter"

        def write() -> None:
            try:
                with atomic_directory(directory) as part:
                    self._write_adapter(part, tensors, progress)
            except (OSError, SafetensorError, ModelError) as error:
                raise UserError(f"{directory}: not written: {error}") from None

        on_main(self.world, write)

    def load(self, checkpoint: Checkpoint) -> None:
        """Loads a checkpoint's state into the engine."""
        try:
            tensors = load_file(checkpoint.path / STATE_FILE)
            load_state(self.engine, self.model.trainable_parameters(), tensors, checkpoint.optimizer_steps)
        except (OSError, SafetensorError, UserError) as error:
            raise UserError(f"{checkpoint.path}: {error}") from None
        self.engine.global_steps = checkpoint.progress.step
        self.engine.global_samples = checkpoint.progress.samples

    def _write(self, progress: Progress, tensors: Mapping[str, Tensor], optimizer_steps: int) -> None:
        root = checkpoints_dir(self.config.run_dir)
        for leftover in root.glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        final = root / f"step_{progress.step:08d}"
        with atomic_directory(final) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part / STATE_FILE)
            prefix = f"{MASTER}/"
            masters = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            self._write_adapter(part / "adapter", masters, progress)
            content = {
                "format_version": CHECKPOINT_FORMAT,
                "progress": asdict(progress),
                "optimizer_steps": optimizer_steps,
                "config": to_plain(self.config),
                "data_digest": self.data_digest,
                "files": {STATE_FILE: _describe(part / STATE_FILE)},
            }
            (part / INFO_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        _point(root / LATEST, final.name)
        if progress.best_step == progress.step:
            _point(root / BEST, final.name)
        self._prune(root)

    def _write_adapter(self, directory: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        save_adapter(
            directory,
            tensors,
            self.model,
            language_model=self.config.model.language_model,
            vision_tower=self.config.model.vision_tower,
            dtype=self.dtype,
            info={"step": progress.step, "samples": progress.samples, "task": self.config.data.task},
        )

    def _prune(self, root: Path) -> None:
        """Removes all but the last ``keep_checkpoints`` and the best."""
        kept = {_pointed(root / LATEST), _pointed(root / BEST)}
        for path in step_dirs(root)[self.config.train.keep_checkpoints :]:
            if path.name not in kept:
                # Renamed first: a directory with a checkpoint's name is always complete.
                shutil.rmtree(path.rename(part_of(path)), ignore_errors=True)


def find_checkpoint(run_dir: str | Path, resume: str) -> Checkpoint | None:
    """Finds and verifies the checkpoint to resume from.

    ``resume`` is ``never``, ``auto`` (the newest that is intact, or none) or the path of one, which must be
    intact.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    root = checkpoints_dir(run_dir)
    names = [_pointed(root / LATEST), *(path.name for path in step_dirs(root))]
    for name in dict.fromkeys(name for name in names if name):
        try:
            return read_checkpoint(root / name)
        except UserError as error:
            print(f"warning: {error}; looking for an older one", file=sys.stderr, flush=True)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's ``state.json``, and compares its files with their sizes and hashes."""
    try:
        content = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
        if content["format_version"] != CHECKPOINT_FORMAT:
            raise UserError(
                f"{path}: checkpoint format {content['format_version']}, not {CHECKPOINT_FORMAT}; "
                "continue with the version of the program that wrote it, or train anew"
            )
        for name, promised in content["files"].items():
            if _describe(path / name) != promised:
                raise UserError(f"{path / name}: changed since it was written (size or sha256 differs)")
        return Checkpoint(
            path,
            Progress(**content["progress"]),
            content["optimizer_steps"],
            content["config"],
            content["data_digest"],
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a complete checkpoint: {error.filename} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint: {type(error).__name__} {error}") from None


def restore_adapter(directory: Path, checkpoint: Checkpoint) -> bool:
    """Replaces an adapter that is missing, damaged or older by the last checkpoint's. Rank 0 alone.

    Returns whether that was necessary.
    """
    try:
        if read_manifest(directory).get("step") == checkpoint.progress.step:
            return False
    except (ModelError, OSError, ValueError, KeyError, TypeError):
        pass  # Missing or damaged.
    source = checkpoint.path / "adapter"
    try:
        read_manifest(source)
        with atomic_directory(directory) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    except (ModelError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not written from {source}: {error}") from None
    return True


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def step_dirs(root: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _point(pointer: Path, name: str) -> None:
    with atomic_file(pointer) as part:
        part.write_text(name + "\n", encoding="utf-8")


def _pointed(pointer: Path) -> str | None:
    try:
        return pointer.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
