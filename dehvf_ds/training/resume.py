"""What a run goes on from: checkpoints found and verified, and what would be another run refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dehvf_ds.config import ModelConfig, RunConfig, UserError, load_run_config, save_run_config, to_plain
from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.artifact import CONFIG_FILE, read_manifest
from dehvf_ds.model.identity import check_base
from dehvf_ds.model.weights import find_adapter
from dehvf_ds.training.durable import read_pointer, size_and_hash
from dehvf_ds.training.engine import build_model_config
from dehvf_ds.training.lease import Lease
from dehvf_ds.training.progress import Progress

FORMAT_VERSION = 2
STATE_FILE = "state.safetensors"
INFO_FILE = "state.json"
LATEST_FILE = "latest"
BEST_FILE = "best"

# What a run leaves in its directory.
RUN_PARTS = ("adapter", "eval", "samples", "tensorboard", "checkpoints", "merged")

# What may differ between the parts of one run: paths, speed, and what is looked at.
FREE_KEYS = (
    "run_dir",
    "deepspeed",
    "overwrite",
    "resume",
    "dry_run",
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
    "train.max_failed_saves",
    "train.eval_every",
    "train.levels_every",
    "train.log_every",
    "train.timeout_minutes",
    "train.start_timeout_minutes",
    "eval.every_steps",
    "eval.data",
    "eval.max_samples",
    "eval.batch_size",
    "eval.max_new_tokens",
    "eval.num_beams",
    "eval.tokenizer",
)


# What decides what trained weights compute.
_OF_WEIGHTS = (
    "fusion",
    "router",
    "levels",
    "rank",
    "router_dim",
    "image_size",
    "prefix_tokens",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
)


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


def open_run(config: RunConfig, data_digest: str) -> tuple[Lease, Checkpoint | None]:
    """Takes the run directory for this job, and finds what to go on from. Rank 0 alone.

    Raises:
        UserError: the directory is in use, or holds another run.
    """
    run_dir = Path(config.run_dir)
    lease = Lease(run_dir)
    try:
        checkpoint = choose_start(config, data_digest)
        if config.overwrite:
            for name in RUN_PARTS:
                shutil.rmtree(run_dir / name, ignore_errors=True)
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        save_run_config(config, run_dir / "config.yaml")
    except BaseException:
        lease.release()
        raise
    return lease, checkpoint


def choose_start(config: RunConfig, data_digest: str) -> Checkpoint | None:
    """Finds what a run goes on from; changes nothing.

    Returns:
        The checkpoint; None for a run that begins.

    Raises:
        UserError: the run directory holds another run, or the weights to start from do not fit.
    """
    run_dir = Path(config.run_dir)
    if config.overwrite:
        check_overwrite(config)
    checkpoint = None if config.overwrite else find_checkpoint(run_dir, config.resume)
    if checkpoint is not None:
        check_same_run(checkpoint, config, data_digest)
        check_bases(checkpoint.path / "adapter", config.model, str(checkpoint.path))
        return checkpoint
    if (run_dir / "metrics.jsonl").exists() and not config.overwrite:
        _check_can_start_again(config, run_dir)
    if config.init_from is not None:
        try:
            adapter = find_adapter(config.init_from)
        except ModelError as error:
            raise UserError(f"--init_from {config.init_from}: {error}") from None
        check_bases(adapter, config.model, config.init_from)
        check_same_model(adapter, config.model, config.init_from)
    return None


def check_overwrite(config: RunConfig) -> None:
    """Refuses to empty a directory that is no run, or that holds what the run needs.

    Raises:
        UserError: says what lies there.
    """
    run_dir = Path(config.run_dir)
    if config.resume not in ("auto", "never"):
        raise UserError("--overwrite removes the checkpoints that --resume goes on from; give one of them")
    parts = [run_dir / name for name in RUN_PARTS if (run_dir / name).exists()]
    if not parts and not (run_dir / "metrics.jsonl").exists():
        return
    if not _is_run(run_dir):
        found = parts[0].name if parts else "metrics.jsonl"
        raise UserError(
            f"run_dir {run_dir} holds {found} and no run's config.yaml, so --overwrite leaves it alone; "
            "name another"
        )
    needed = {
        "model.language_model": config.model.language_model,
        "model.vision_tower": config.model.vision_tower,
        "data.train": config.data.train,
        "data.location": config.data.location,
        "data.val": config.data.val,
        "data.cache_dir": config.data.cache_dir,
        "eval.data": config.eval.data,
        "deepspeed": config.deepspeed,
        "init_from": config.init_from,
        "the working directory": ".",
    }
    whole = run_dir.resolve()
    for name, path in needed.items():
        if path is None:
            continue
        found = Path(path).resolve()
        # What a run trained lies in such a part, also where the run itself is named.
        if (name == "init_from" and found == whole) or any(found.is_relative_to(p.resolve()) for p in parts):
            raise UserError(
                f"--overwrite would remove {name} {path}, which lies in run_dir {run_dir}; name another"
            )


def _is_run(run_dir: Path) -> bool:
    try:
        return "run_dir:" in (run_dir / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def is_finished(config: RunConfig, num_steps: int) -> bool:
    """Whether the run directory holds this very run at its end, which kept no checkpoint. Rank 0 alone."""
    run_dir = Path(config.run_dir)
    if config.overwrite or config.resume != "auto" or step_dirs(checkpoints_dir(run_dir)):
        return False
    try:
        # The last step's numbers are written after the last validation.
        *_, last = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ends = [json.loads(last)["step"], read_manifest(run_dir / "adapter")["step"]]
        before = load_run_config(run_dir / "config.yaml")
    except (OSError, ValueError, KeyError, TypeError, ModelError, UserError):
        return False
    return ends == [num_steps, num_steps] and not _differences(to_plain(before), to_plain(config))


def _check_can_start_again(config: RunConfig, run_dir: Path) -> None:
    """A run that was killed before its first checkpoint starts again by itself; anything else is kept."""
    remedy = "name another, or pass --overwrite true"
    if config.resume == "never" or (run_dir / "adapter").exists() or not (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir {config.run_dir} holds a run; {remedy}")
    check_same_config(run_dir / "config.yaml", config, remedy)


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
    names = [read_pointer(root / LATEST_FILE), *(path.name for path in step_dirs(root))]
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
            raise UserError(
                f"{path}: checkpoint format {content['format_version']}, not {FORMAT_VERSION}; go on with "
                "the version of the program that wrote it, or train anew"
            )
        for name, promised in content["files"].items():
            if size_and_hash(path / name) != promised:
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


def check_same_model(adapter: Path, config: ModelConfig, owner: str) -> None:
    """Refuses weights that were trained in another model: many would fit, and do something else.

    Args:
        adapter: the artifact, over the same bases.
        config: of the run that wants it.
        owner: what the message calls it.

    Raises:
        UserError: names the settings that differ, with both values.
    """
    before = DehvfConfig.from_json_file(str(adapter / CONFIG_FILE))
    now = build_model_config(config, image_size=config.image_size or before.image_size)
    there, here = ({**vars(each), **_lora_settings(each.lora)} for each in (before, now))
    differing = [
        f"model.{name} ({there[name]} there, {here[name]} now)"
        for name in _OF_WEIGHTS
        if there[name] != here[name]
    ]
    if differing:
        raise UserError(
            f"--init_from {owner} was trained in another model: {', '.join(differing)}; set them as they "
            "were, or start without it"
        )


def _lora_settings(lora: Mapping[str, Any] | None) -> dict[str, Any]:
    lora = lora or {"rank": 0}
    return {f"lora.{name}": lora.get(name) for name in ("rank", "alpha", "targets")}


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


def step_dirs(root: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
