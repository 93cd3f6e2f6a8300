"""The DeepSpeed JSON: read, checked, and completed with what our configuration owns."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

import torch
from pydantic import ValidationError

from dehvf_ds.config import RunConfig, UserError, find_deepspeed_json
from dehvf_ds.distributed import has_fast_bf16


def read_deepspeed_json(
    path: str, config: RunConfig, world_size: int, local_size: int | None = None
) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and completes it with what our configuration owns.

    Args:
        path: the JSON file, or a shipped one's name.
        config: the run; owner of batch sizes, clipping, optimizer and schedule.
        world_size: ranks of the job.
        local_size: ranks of a node, for hpZ's ``auto``; None means all are of one node.

    Returns:
        A configuration for ``deepspeed.initialize`` and ``HfDeepSpeedConfig``.

    Raises:
        UserError: no such file, not JSON, a key that contradicts our configuration, or one that DeepSpeed
            does not know.
    """
    try:
        text = find_deepspeed_json(path).read_text(encoding="utf-8")
        given = json.loads(text, object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path}: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"--deepspeed {path}: not a JSON object")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(given.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {given[key]!r}, not a section in braces")
    train = config.train
    owned = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("the derived accumulation", train.accumulation(world_size)),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    for key, (ours, value) in owned.items():
        if given.get(key, "auto") not in ("auto", value):
            raise UserError(f"{path}: {key} is {given[key]}, but {ours} is {value}; remove it from the JSON")
    for key in ("optimizer", "scheduler"):
        if key in given:
            raise UserError(
                f"{path}: {key} is set by train.* of the run's configuration; remove it from the JSON"
            )
    if _enabled(given, "fp16"):
        raise UserError(f"{path}: fp16 is not supported; enable bf16, or neither for fp32")
    if given.get("bf16", {}).get("enabled") == "auto":
        given["bf16"] = given["bf16"] | {"enabled": has_fast_bf16()}
    _fill_hpz(path, given, world_size, local_size or world_size)
    _check_with_deepspeed(path, given)
    given |= {key: value for key, (_, value) in owned.items()}
    given.setdefault("zero_optimization", {"stage": 0})
    given.setdefault("steps_per_print", 10**9)
    return given


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype that a DeepSpeed configuration computes in: bf16 or fp32."""
    return torch.bfloat16 if _enabled(ds_config, "bf16") else torch.float32


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)} stands there twice")
    return content


class _AskedDict(dict):
    """A dictionary that remembers which keys it was asked for."""

    def __init__(self, content: dict[str, Any]):
        super().__init__(content)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __copy__(self) -> _AskedDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _AskedDict:
        return self


def _check_with_deepspeed(path: str, given: dict[str, Any]) -> None:
    """Lets DeepSpeed read the configuration, and finds the keys that it passes over in silence.

    Sections that DeepSpeed hands to a pydantic model refuse unknown keys themselves. At the top, and in
    ``data_types``, a misspelt key is one that it never asks for. Keys that begin with ``_`` are comments.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    sections = {key: given[key] for key in ("data_types",) if isinstance(given.get(key), dict)}
    asked = {key: _AskedDict(section) for key, section in sections.items()}
    # Its batch sizes depend on the ranks, which need not have met yet.
    top = _AskedDict(given | asked | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    top.pop("train_batch_size", None)
    try:
        DeepSpeedConfig(top)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise UserError(f"{path}: {key}: {wrong['msg']} (DeepSpeed's {error.title})") from None
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"{path}: DeepSpeed refuses it: {error}") from None
    for name, section in {"": top, **asked}.items():
        for key in section.keys() - section.asked:
            if not key.startswith("_"):
                shown = f"{name}.{key}" if name else key
                near = difflib.get_close_matches(key, section.asked, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"{path}: DeepSpeed knows no key {shown}{hint}")


def _fill_hpz(path: str, given: dict[str, Any], world_size: int, local_size: int) -> None:
    """Gives hpZ's second copy of the weights the size of a node where the JSON says ``auto``."""
    zero = given.get("zero_optimization", {})
    size = zero.get("zero_hpz_partition_size", 1)
    if size == "auto":
        # On a single node the copy would cost memory for nothing.
        size = zero["zero_hpz_partition_size"] = local_size if local_size < world_size else 1
    if world_size > size and world_size % size:
        raise UserError(
            f"{path}: zero_hpz_partition_size {size} does not divide the {world_size} ranks; set it to the "
            "GPUs of a node, or to auto"
        )


def _enabled(ds_config: dict[str, Any], precision: str) -> bool:
    return ds_config.get(precision, {}).get("enabled", False) is True
