"""What the run of one recipe needs on disk: backbones, shards, a run directory, a DeepSpeed JSON."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dehvf_ds.doctor.report import GIB, Check, Line, format_bytes

if TYPE_CHECKING:
    from dehvf_ds.config import RunConfig


def recipe_checks(recipe: str) -> Iterator[Check]:
    """What the run of a recipe needs on disk; the recipe alone where it cannot be read."""
    configs: list[RunConfig] = []

    def read() -> Line:
        from dehvf_ds.config import parse_run_config

        configs.append(parse_run_config(["--config", recipe]))
        return Line("ok", "recipe", recipe)

    yield Check("recipe", read)
    if not configs:
        return
    yield from run_checks(configs[0])


def run_checks(config: RunConfig) -> Iterator[Check]:
    """What a run needs on disk."""
    backbones = {"language model": config.model.language_model, "vision tower": config.model.vision_tower}
    for what, source in backbones.items():
        yield Check(what, partial(check_backbone, what, source))
    yield Check("training shards", partial(check_shards, config))
    yield Check("run directory", partial(check_run_dir, config.run_dir))
    yield Check("DeepSpeed JSON", partial(check_deepspeed_json, config))


def check_backbone(what: str, source: str) -> Line:
    """A backbone's directory, or a hub id's place in the local cache. Asks no server.

    Args:
        what: ``language model`` or ``vision tower``.
        source: directory or hub id.
    """
    remedy = f"give a directory or a hub id as --model.{what.replace(' ', '_')}"
    directory = Path(source)
    if not directory.is_dir():
        # A hub id is `name` or `owner/name`; a path that is not there may look the same.
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is None:
            return Line("FAIL", what, f"{source}: no such directory", remedy)
        return _hub_line(what, source, remedy)
    from dehvf_ds.model.backbones import load_backbone_config

    kind = load_backbone_config(source, vision=what == "vision tower").model_type
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        return Line("FAIL", what, f"{source}: configuration without weights", "copy *.safetensors there too")
    return Line("ok", what, f"{source}: {kind}")


def _hub_line(what: str, source: str, remedy: str) -> Line:
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return Line("ok", what, f"{source}: in the hub's cache")
    if constants.HF_HUB_OFFLINE:
        return Line("FAIL", what, f"{source}: neither here nor in the cache, and offline", remedy)
    found = f"{source}: no directory, and not in the hub's cache"
    return Line("warn", what, found, f"a run will download it if it is a hub id; otherwise {remedy}")


def check_shards(config: RunConfig) -> Line:
    """The training shards: their index, and the size of every file."""
    from dehvf_ds.data.index import ShardIndex

    index = ShardIndex.of_training(config.data)
    index.check_sizes()
    found = f"{config.data.train}: {len(index):,} samples in {len(index.shard_names):,} shards"
    return Line("ok", "training shards", found)


def check_run_dir(run_dir: str) -> Line:
    """Whether the run can write its directory, or make it."""
    path = Path(run_dir).absolute()
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    if not existing.is_dir():
        return Line("FAIL", "run directory", f"{existing} is a file", "name another as --run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Line("FAIL", "run directory", f"{existing}: not writable", "name another as --run_dir")
    free = shutil.disk_usage(existing).free
    found = f"{run_dir}: {format_bytes(free)} free"
    if free < GIB:
        return Line("warn", "run directory", found, "make room, or name another as --run_dir")
    return Line("ok", "run directory", found)


def check_deepspeed_json(config: RunConfig) -> Line:
    """The DeepSpeed JSON: readable, and at one with the recipe."""
    from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json

    ds_config = read_deepspeed_json(config.deepspeed, config, 1)
    stage = ds_config["zero_optimization"].get("stage", 0)
    dtype = str(compute_dtype(ds_config)).removeprefix("torch.")
    return Line("ok", "DeepSpeed JSON", f"{config.deepspeed}: ZeRO-{stage}, {dtype}")
