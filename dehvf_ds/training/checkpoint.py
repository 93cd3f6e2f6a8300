"""What leaves the loop: the adapter artifact, and checkpoints that a run is continued from.

checkpoints/step_00000100/
  state.safetensors   fp32 master values and moments of the trainables, whole, free of the number of ranks
  state.json          where the run stood, its configuration, size and hash of the files
  adapter/            the artifact of that step
checkpoints/latest    the name of the newest; moved last
checkpoints/best      the name of the one with the lowest validation loss

A checkpoint is written beside its name, flushed to the disk and then renamed: what has the name is whole.
Random numbers are functions of (seed, step, micro-step, rank) and of (seed, epoch, sample): none are saved.
The frozen weights are not in it; their identity is, in the artifact's manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dehvf_ds.config import ModelConfig, RunConfig, UserError, load_run_config, to_plain
from dehvf_ds.distributed import World, on_main
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.artifact import read_manifest, save_adapter
from dehvf_ds.model.identity import check_base
from dehvf_ds.training.state import gather_state, gather_trainables, load_state

FORMAT_VERSION = 1
STATE_FILE = "state.safetensors"
INFO_FILE = "state.json"
LATEST_FILE = "latest"
BEST_FILE = "best"

# What may differ between the parts of one run: paths, speed, and what is looked at.
FREE_KEYS = (
    "run_dir",
    "deepspeed",
    "overwrite",
    "resume",
    "init_from",
    "model.language_model",
    "model.vision_tower",
    "data.train",
    "data.location",
    "data.cache_dir",
    "data.cache_gb",
    "data.on_bad",
    "data.max_bad_share",
    "data.num_workers",
    "data.val",
    "data.val_samples",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.max_bad_steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.levels_every",
    "train.log_every",
    "train.timeout_minutes",
)


@dataclass
class Progress:
    """Where a run stands, counted over all ranks.

    Attributes:
        step: optimizer steps done, those skipped for gradients that are not finite included.
        samples: rows consumed.
        tokens: text tokens seen.
        skipped: steps that were not taken.
        skipped_in_a_row: of these, how many the last ones.
        unsupervised_rows: rows that had nothing to learn.
        replaced: damaged samples in whose place another stood.
        best_loss: lowest validation loss so far.
        best_step: its step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    unsupervised_rows: int = 0
    replaced: int = 0
    best_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, verified.

    Attributes:
        path: its directory.
        progress: where the run stood.
        optimizer_steps: steps that the optimizer had taken.
        config: the run's configuration, plain.
        data_digest: what tells the training shards from others.
    """

    path: Path
    progress: Progress
    optimizer_steps: int
    config: dict[str, Any]
    data_digest: str

    def load_tensors(self) -> dict[str, Tensor]:
        """Reads the state's tensors."""
        return load_file(self.path / STATE_FILE)


@dataclass
class Checkpoints:
    """Writes and finds a run's checkpoints.

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
                "files": {STATE_FILE: _size_and_hash(part / STATE_FILE)},
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
        for path in _step_dirs(root)[self.config.train.keep_checkpoints :]:
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


def find_checkpoint(run_dir: str | Path, resume: str) -> Checkpoint | None:
    """Finds the checkpoint to go on from, and verifies it.

    Args:
        run_dir: the run.
        resume: ``never``, ``auto`` (the newest that is whole, or none) or a checkpoint's path.

    Raises:
        UserError: the path is no checkpoint, or is damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    root = checkpoints_dir(run_dir)
    if not root.is_dir():
        return None
    names = [read_pointer(root / LATEST_FILE), *(path.name for path in _step_dirs(root))]
    for name in dict.fromkeys(name for name in names if name):
        try:
            return read_checkpoint(root / name)
        except UserError as error:
            print(f"warning: {error}; looking for an older one", file=sys.stderr, flush=True)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads where a checkpoint stands, and compares its files with their sizes and hashes.

    Raises:
        UserError: it is not there, not whole, or of another format.
    """
    try:
        content = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: checkpoint format {content['format_version']}, not {FORMAT_VERSION}")
        for name, promised in content["files"].items():
            if _size_and_hash(path / name) != promised:
                raise UserError(f"{path / name}: changed since it was written (size or sha256 differs)")
        return Checkpoint(
            path,
            Progress(**content["progress"]),
            content["optimizer_steps"],
            content["config"],
            content["data_digest"],
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: not a whole checkpoint: {error.filename} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint: {type(error).__name__} {error}") from None


def check_same_run(checkpoint: Checkpoint, config: RunConfig, data_digest: str) -> None:
    """Refuses to continue a run with what would make it another one.

    Raises:
        UserError: names the keys that differ, with both values.
    """
    if differing := _differences(checkpoint.config, to_plain(config)):
        raise UserError(
            f"{checkpoint.path} is of a run with other settings: {', '.join(differing[:4])}; give them as "
            "they were, name another run_dir, or start anew from its weights with --init_from"
        )
    if checkpoint.data_digest != data_digest:
        raise UserError(
            f"{checkpoint.path} was trained on other shards than data.train {config.data.train}; "
            "name another run_dir, or start anew from its weights with --init_from"
        )


def check_bases(adapter: Path, config: ModelConfig, owner: str) -> None:
    """Refuses frozen models other than those that an artifact was trained on.

    Args:
        adapter: the artifact.
        config: names the backbones of the run that wants it.
        owner: what the message calls it.

    Raises:
        UserError: a backbone differs in its configuration or its weights; names the first that does.
    """
    try:
        bases = read_manifest(adapter)["bases"]
        for name, source in (
            ("language_model", config.language_model),
            ("vision_tower", config.vision_tower),
        ):
            check_base(bases[name], source, vision=name == "vision_tower", owner=owner)
    except ModelError as error:
        raise UserError(str(error)) from None


def check_same_config(path: Path, config: RunConfig, remedy: str) -> None:
    """Refuses to start a run over the traces of another.

    Args:
        path: the configuration that lies there.
        config: the run's.
        remedy: ends the message.

    Raises:
        UserError: names the keys that differ.
    """
    try:
        before = to_plain(load_run_config(path))
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if differing := _differences(before, to_plain(config)):
        raise UserError(f"{path} is of a run with other settings: {', '.join(differing[:4])}; {remedy}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys that make another run, with both values."""
    flat_before, flat_now = _flat(before), _flat(now)
    return [
        f"{key} ({flat_before.get(key)} there, {flat_now.get(key)} now)"
        for key in sorted(flat_before.keys() | flat_now.keys())
        if key not in FREE_KEYS and flat_before.get(key) != flat_now.get(key)
    ]


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def write_pointer(path: Path, name: str) -> None:
    """Writes a file that holds one name, so that it always holds a whole one."""
    part = path.with_name(f".{path.name}.part-pointer")
    part.write_text(name + "\n", encoding="utf-8")
    flush_to_disk(part)
    part.rename(path)
    flush_to_disk(path.parent)


def read_pointer(path: Path) -> str | None:
    """The name in a pointer file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _step_dirs(root: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)


def _size_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
