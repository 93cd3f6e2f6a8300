"""The DeepSpeed JSON: read, checked, and completed with what our configuration owns."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import torch
from pydantic import ValidationError

from dehvf_ds.config import RunConfig, UserError, find_deepspeed_json
from dehvf_ds.distributed import has_fast_bf16
from dehvf_ds.training.deepspeed_keys import check_keys

_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[][{}]')


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
        UserError: no such file, not JSON, a key that contradicts our configuration or is not supported.
    """
    try:
        text = find_deepspeed_json(path).read_text(encoding="utf-8-sig")
        given = json.loads(text, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"--deepspeed {path}: not a JSON object")
    _refuse_duplicates(text, path)
    given = check_keys(given, path)
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
    if given.get("bf16", {}).get("enabled") == "auto":
        given["bf16"] = given["bf16"] | {"enabled": has_fast_bf16()}
    fp32_sums = given.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if given["zero_optimization"]["stage"] == 1 and _enabled(given, "bf16") and fp32_sums:
        # DeepSpeed's optimizer for this case keeps its state where no checkpoint of ours finds it.
        raise UserError(
            f"{path}: zero_optimization.stage 1 with bf16 and data_types.grad_accum_dtype fp32 fails; "
            "take stage 2"
        )
    _fill_hpz(path, given, world_size, local_size or world_size)
    _check_with_deepspeed(path, given)
    given |= {key: value for key, (_, value) in owned.items()}
    given.setdefault("steps_per_print", 10**9)
    return given


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype that a DeepSpeed configuration computes in: bf16 or fp32."""
    return torch.bfloat16 if _enabled(ds_config, "bf16") else torch.float32


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_duplicates(text: str, path: str) -> None:
    """Refuses a key that stands in one object twice, of which JSON's readers take the last in silence.

    Args:
        text: JSON that was read once.
        path: the file, for the message.
    """
    open_objects: list[dict[str, int]] = []
    names: list[str] = []
    key = ""
    for match in _JSON_TOKEN.finditer(text):
        if match[0] in "{[":
            open_objects.append({})
            names.append(key)
            key = ""
        elif match[0] in "}]":
            open_objects.pop()
            names.pop()
            key = ""
        elif match[2]:
            key, line = json.loads(match[1]), text.count("\n", 0, match.start()) + 1
            if key in open_objects[-1]:
                full = ".".join([name for name in names[1:] if name] + [key])
                raise UserError(
                    f"{path}: {full} stands there twice, in line {open_objects[-1][key]} and in line {line}; "
                    "keep one"
                )
            open_objects[-1][key] = line


def _check_with_deepspeed(path: str, given: dict[str, Any]) -> None:
    """Lets DeepSpeed read the configuration, for the ranges and combinations that it checks itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # Its batch sizes depend on the ranks, which need not have met yet.
    top = given | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    top.pop("train_batch_size", None)
    try:
        DeepSpeedConfig(top)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise UserError(f"{path}: {key}: {wrong['msg']} (DeepSpeed's {error.title})") from None
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"{path}: DeepSpeed refuses it: {error}") from None


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
