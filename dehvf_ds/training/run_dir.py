"""A run's directory: its files, and whether a run begins in it, resumes, replaces another, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dehvf_ds.config import (
    ModelConfig,
    RunConfig,
    UserError,
    load_run_config,
    save_run_config,
    settings_of,
    to_plain,
)
from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.adapter import CONFIG_FILE, check_base, find_adapter, read_manifest
from dehvf_ds.training.checkpoint import Checkpoint, checkpoints_dir, find_checkpoint, step_dirs
from dehvf_ds.training.engine import build_model_config
from dehvf_ds.training.run_lock import RunLock

METRICS_FILE = "metrics.jsonl"
RUN_CONFIG_FILE = "config.yaml"
ADAPTER_DIR = "adapter"
RUN_DIRS = (ADAPTER_DIR, "eval", "samples", "tensorboard", "checkpoints", "merged")

MAY_CHANGE_ON_RESUME = frozenset(
    """
    run_dir deepspeed overwrite resume dry_run init_from model.language_model model.vision_tower data.train
    data.location data.cache_dir data.cache_gb data.on_bad data.max_bad_share data.num_workers data.val
    data.val_samples train.micro_batch_size train.activation_checkpointing train.compile train.max_bad_steps
    train.save_every train.keep_checkpoints train.max_failed_saves train.validate_every train.router_every
    train.log_every train.trackers train.timeout_minutes train.start_timeout_minutes eval.every_steps
    eval.data eval.max_samples eval.batch_size eval.max_new_tokens eval.num_beams eval.tokenizer
    """.split()  # noqa: SIM905
)
"""Settings that may differ when a run resumes: paths, speed, what is measured."""

WEIGHT_KEYS = (
    *("fusion", "router", "feature_layers", "rank", "router_dim", "image_size", "prefix_tokens"),
    *("lora.rank", "lora.alpha", "lora.targets"),
)
"""Model settings that trained weights depend on."""


def open_run_dir(config: RunConfig, data_digest: str) -> tuple[RunLock, Checkpoint | None]:
    """Locks the run directory for this job, and finds the checkpoint to resume from. Rank 0 alone."""
    run_dir = Path(config.run_dir)
    lock = RunLock(run_dir)
    try:
        checkpoint = choose_start(config, data_digest)
        if config.overwrite:
            for name in RUN_DIRS:
                shutil.rmtree(run_dir / name, ignore_errors=True)
            (run_dir / METRICS_FILE).unlink(missing_ok=True)
        save_run_config(config, run_dir / RUN_CONFIG_FILE)
    except BaseException:
        lock.release()
        raise
    return lock, checkpoint


def choose_start(config: RunConfig, data_digest: str) -> Checkpoint | None:
    """Finds the checkpoint to resume from; None for a run that begins. Changes nothing.

    UserError if the directory holds another run, or the weights to start from do not fit.
    """
    run_dir = Path(config.run_dir)
    if config.overwrite:
        _check_overwrite(config)
    elif (checkpoint := find_checkpoint(run_dir, config.resume)) is not None:
        _check_same_run(checkpoint, config, data_digest)
        _check_backbones(checkpoint.path / "adapter", config.model, str(checkpoint.path))
        return checkpoint
    elif (run_dir / METRICS_FILE).exists():
        _check_can_start_again(config)
    if config.init_from is not None:
        try:
            adapter = find_adapter(config.init_from)
        except ModelError as error:
            raise UserError(f"--init_from {config.init_from}: {error}") from None
        _check_backbones(adapter, config.model, config.init_from)
        _check_same_model(adapter, config.model, config.init_from)
    return None


def is_finished(config: RunConfig, num_steps: int) -> bool:
    """Whether the directory holds this very run, finished but without checkpoints. Rank 0 alone."""
    run_dir = Path(config.run_dir)
    if config.overwrite or config.resume != "auto" or step_dirs(checkpoints_dir(run_dir)):
        return False
    try:
        # The last step's line is written after the last validation.
        *_, last = (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        ends = [json.loads(last)["step"], read_manifest(run_dir / ADAPTER_DIR)["step"]]
        before = load_run_config(run_dir / RUN_CONFIG_FILE)
    except (OSError, ValueError, KeyError, TypeError, ModelError, UserError):
        return False
    return ends == [num_steps, num_steps] and not _differences(to_plain(before), config)


def _check_overwrite(config: RunConfig) -> None:
    """Refuses to overwrite what is not a run, or what the new run needs."""
    run_dir = Path(config.run_dir)
    if config.resume not in ("auto", "never"):
        raise UserError("--overwrite removes the checkpoints that --resume continues from; give one of them")
    parts = [run_dir / name for name in RUN_DIRS if (run_dir / name).exists()]
    if not parts and not (run_dir / METRICS_FILE).exists():
        return
    try:
        is_run = "run_dir:" in (run_dir / RUN_CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        is_run = False
    if not is_run:
        found = parts[0].name if parts else METRICS_FILE
        raise UserError(
            f"run_dir {run_dir} holds {found} and no run's {RUN_CONFIG_FILE}, so --overwrite leaves it "
            "alone; name another"
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
    removed = [part.resolve() for part in parts]
    for name, path in needed.items():
        if path is None:
            continue
        found = Path(path).resolve()
        # A run that is named as init_from contains the adapter, which would be removed.
        if (name == "init_from" and found == run_dir.resolve()) or any(map(found.is_relative_to, removed)):
            raise UserError(
                f"--overwrite would remove {name} {path}, which lies in run_dir {run_dir}; name another"
            )


def _check_can_start_again(config: RunConfig) -> None:
    """A run that was killed before its first checkpoint may start again; any other is refused."""
    run_dir = Path(config.run_dir)
    path, remedy = run_dir / RUN_CONFIG_FILE, "name another, or pass --overwrite true"
    if config.resume == "never" or (run_dir / ADAPTER_DIR).exists() or not path.exists():
        raise UserError(f"run_dir {config.run_dir} holds a run; {remedy}")
    try:
        before = to_plain(load_run_config(path))
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if differing := _differences(before, config):
        raise UserError(f"{path} belongs to a run with other settings: {', '.join(differing[:4])}; {remedy}")


def _check_same_run(checkpoint: Checkpoint, config: RunConfig, data_digest: str) -> None:
    if differing := _differences(checkpoint.config, config):
        raise UserError(
            f"{checkpoint.path} belongs to a run with other settings: {', '.join(differing[:4])}; set them "
            "as they were, name another run_dir, or start a new run from its weights with --init_from"
        )
    if checkpoint.data_digest != data_digest:
        raise UserError(
            f"{checkpoint.path} was trained on other shards than data.train {config.data.train}; "
            "name another run_dir, or start a new run from its weights with --init_from"
        )


def _check_backbones(adapter: Path, config: ModelConfig, owner: str) -> None:
    """Refuses frozen models whose configuration or weights are not those that an adapter was trained on."""
    try:
        bases = read_manifest(adapter)["bases"]
        check_base(bases["language_model"], config.language_model, vision=False, owner=owner)
        check_base(bases["vision_tower"], config.vision_tower, vision=True, owner=owner)
    except ModelError as error:
        raise UserError(str(error)) from None


def _check_same_model(adapter: Path, config: ModelConfig, owner: str) -> None:
    """Refuses weights of another model: many would load, and compute something else."""
    before = DehvfConfig.from_json_file(str(adapter / CONFIG_FILE))
    now = build_model_config(config, image_size=config.image_size or before.image_size)
    there, here = (flatten(vars(each) | {"lora": each.lora or {"rank": 0}}) for each in (before, now))
    differing = [
        f"model.{name} ({there.get(name)} there, {here.get(name)} now)"
        for name in WEIGHT_KEYS
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(
            f"--init_from {owner} was trained with a different model: {', '.join(differing)}; set them as "
            "they were, or start without it"
        )


def _differences(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Settings that make it another run, with both values. A setting that is new since had its default."""
    here, known = flatten(to_plain(config)), settings_of(RunConfig).items()
    new = {
        name: to_plain(field.get_default(call_default_factory=True))
        for name, field in known
        if not field.is_required()
    }
    there = new | flatten(before)
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} now)"
        for key in sorted(there.keys() | here.keys())
        if key not in MAY_CHANGE_ON_RESUME and there.get(key) != here.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
