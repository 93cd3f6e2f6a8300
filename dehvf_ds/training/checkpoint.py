"""What leaves the loop: the adapter artifact, and checkpoints that a run is continued from.

checkpoints/step_00000100/
  state.safetensors   fp32 master values and moments of the trainables, whole, free of the number of ranks
  state.json          where the run stood, its configuration, size and hash of the files
  adapter/            the artifact of that step
checkpoints/latest    the name of the newest; moved last
checkpoints/best      the name of the one with the highest score, or the lowest validation loss without scores

A checkpoint is written beside its name, flushed to the disk and then renamed: what has the name is whole.
Random numbers are functions of (seed, step, micro-step, rank) and of (seed, epoch, sample): none are saved.
The frozen weights are not in it; their identity is, in the artifact's manifest.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dehvf_ds.config import ModelConfig, RunConfig, UserError, to_plain
from dehvf_ds.distributed import World, on_main
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.artifact import read_manifest, replace_artifact, save_adapter
from dehvf_ds.training.durable import flush_to_disk, read_pointer, size_and_hash, write_pointer
from dehvf_ds.training.progress import Progress
from dehvf_ds.training.resume import (
    BEST_FILE,
    FORMAT_VERSION,
    INFO_FILE,
    LATEST_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoints_dir,
    step_dirs,
)
from dehvf_ds.training.state import gather_state, gather_trainables, load_state


@dataclass
class Checkpoints:
    """Writes a run's checkpoints, and puts one back into an engine.

    Attributes:
        config: the run.
        world: this process's place.
        model: the model inside the engine.
        engine: the DeepSpeed engine.
        dtype: compute dtype of the run.
        data_digest: what tells the training shards from others.
    """

    config: RunConfig
    world: World
    model: DehvfForConditionalGeneration
    engine: Any
    dtype: torch.dtype
    data_digest: str

    def save(self, progress: Progress) -> bool:
        """Writes a checkpoint of this step. Every rank must call it.

        A full disk or a missing permission leaves the ones before as they are and the run alive; it is said.

        Returns:
            Whether it was written.
        """
        parameters = self.model.trainable_parameters()
        tensors, optimizer_steps = gather_state(self.engine, parameters)

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
        return not failure

    def _write(self, progress: Progress, tensors: Mapping[str, Tensor], optimizer_steps: int) -> None:
        root = checkpoints_dir(self.config.run_dir)
        final = root / f"step_{progress.step:08d}"
        part = root / f".{final.name}.part"
        try:
            for leftover in root.glob(".*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, part / STATE_FILE)
            masters = {n.removeprefix("master/"): t for n, t in tensors.items() if n.startswith("master/")}
            info = {"step": progress.step, "samples": progress.samples, "task": self.config.data.task}
            _save_artifact(part / "adapter", masters, self.model, self.config.model, self.dtype, info)
            content = {
                "format_version": FORMAT_VERSION,
                "progress": asdict(progress),
                "optimizer_steps": optimizer_steps,
                "config": to_plain(self.config),
                "data_digest": self.data_digest,
                "files": {STATE_FILE: size_and_hash(part / STATE_FILE)},
            }
            (part / INFO_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
            for path in part.rglob("*"):
                flush_to_disk(path)
            flush_to_disk(part)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            flush_to_disk(root)
            write_pointer(root / LATEST_FILE, final.name)
            if progress.best_step == progress.step:
                write_pointer(root / BEST_FILE, final.name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self._prune(root)

    def _prune(self, root: Path) -> None:
        """Removes all but the last ``keep_checkpoints`` and the best."""
        kept = {read_pointer(root / LATEST_FILE), read_pointer(root / BEST_FILE)}
        for path in step_dirs(root)[self.config.train.keep_checkpoints :]:
            if path.name not in kept:
                # The name goes first: what has it is whole.
                gone = root / f".{path.name}.part"
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def load(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's state into the engine. Every rank must call it.

        Raises:
            UserError: it is of another model.
        """
        try:
            tensors = checkpoint.load_tensors()
            load_state(self.engine, self.model.trainable_parameters(), tensors, checkpoint.optimizer_steps)
        except (OSError, SafetensorError, UserError) as error:
            raise UserError(f"{checkpoint.path}: {error}") from None
        self.engine.global_steps = checkpoint.progress.step
        self.engine.global_samples = checkpoint.progress.samples


def complete_artifact(directory: Path, checkpoint: Checkpoint) -> bool:
    """Puts a last checkpoint's artifact in the place of one that is missing, damaged or older. Rank 0 alone.

    Args:
        directory: the run's artifact.
        checkpoint: of the run's last step.

    Returns:
        Whether it was written; False where the right one was there.

    Raises:
        UserError: the checkpoint's own is damaged, or nothing can be written.
    """
    try:
        if read_manifest(directory).get("step") == checkpoint.progress.step:
            return False
    except (ModelError, OSError, ValueError, KeyError, TypeError):
        pass  # missing, or not whole
    source = checkpoint.path / "adapter"
    try:
        read_manifest(source)
        replace_artifact(directory, lambda part: shutil.copytree(source, part))
    except (ModelError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not written from {source}: {error}") from None
    return True


def save_artifact(
    directory: Path,
    model: DehvfForConditionalGeneration,
    config: ModelConfig,
    world: World,
    dtype: torch.dtype,
    info: Mapping[str, Any],
) -> None:
    """Writes the adapter artifact from rank 0. Every rank must call it.

    Raises:
        UserError: it cannot be written, or a trainable is not finite; the artifact already there stays.
    """
    tensors = gather_trainables(model.trainable_parameters())

    def write() -> None:
        try:
            _save_artifact(directory, tensors, model, config, dtype, info)
        except (OSError, SafetensorError, ModelError) as error:
            raise UserError(f"{directory}: not written: {error}") from None

    on_main(world, write)


def _save_artifact(
    directory: Path,
    tensors: Mapping[str, Tensor],
    model: DehvfForConditionalGeneration,
    config: ModelConfig,
    dtype: torch.dtype,
    info: Mapping[str, Any],
) -> None:
    save_adapter(
        directory,
        tensors,
        model,
        language_model=config.language_model,
        vision_tower=config.vision_tower,
        dtype=dtype,
        info=info,
    )
