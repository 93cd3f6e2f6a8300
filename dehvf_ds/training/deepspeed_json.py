"""The DeepSpeed JSON: which keys this trainer works with, and what the run's configuration fills in.

DeepSpeed ignores keys that it does not know and takes ``"false"`` for true. So every key and the kind of
every value are checked here; ranges and combinations are checked by DeepSpeed's own configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dehvf_ds.config import RunConfig, UserError, find_deepspeed_json, suggestion
from dehvf_ds.data.text import parse_json
from dehvf_ds.distributed import has_fast_bf16


def _is_number(value: object) -> bool:
    # Only the profiler's depth takes a negative number: -1 is all.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value < 1e18


_Kind = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""

_SWITCH: _Kind = ("true or false", lambda value: isinstance(value, bool))
_NUMBER: _Kind = ("a number", _is_number)
# DeepSpeed divides by these two kinds without checking them.
_DIVISOR: _Kind = ("a number above 0", lambda value: _is_number(value) and value > 0)
_COUNT: _Kind = ("a whole number above 0", lambda value: _is_number(value) and value > 0 and value % 1 == 0)
# Stage 0 takes steps with NaN gradients, and keeps no fp32 weights beside bf16.
_STAGE: _Kind = ("1, 2 or 3 (on one GPU take 2)", lambda value: type(value) is int and value in (1, 2, 3))
_DTYPE: _Kind = ('"fp32" or "bf16"', lambda value: value in ("fp32", "bf16"))
_DEVICE: _Kind = ('"cpu" or "none"; nvme is not supported', lambda value: value in ("cpu", "none"))
_TEXT: _Kind = ("a text", lambda value: isinstance(value, str))
_LIST: _Kind = ("a list", lambda value: isinstance(value, list))

_ZERO, _OFFLOAD, _PROFILER = "zero_optimization.", "zero_optimization.offload_param.", "flops_profiler."
SUPPORTED: Mapping[str, _Kind] = {
    section + key: kind
    for kind, section, keys in (
        (_SWITCH, "", "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"),
        (_SWITCH, "", "disable_allgather wall_clock_breakdown memory_breakdown dump_state bf16.enabled"),
        (_NUMBER, "", "train_batch_size train_micro_batch_size_per_gpu"),
        (_NUMBER, "", "gradient_accumulation_steps gradient_clipping"),
        (_DIVISOR, "", "gradient_predivide_factor"),
        (_COUNT, "", "steps_per_print"),
        (_DTYPE, "", "communication_data_type data_types.grad_accum_dtype"),
        (_STAGE, _ZERO, "stage"),
        (_SWITCH, _ZERO, "overlap_comm contiguous_gradients reduce_scatter allgather_partitions"),
        (_SWITCH, _ZERO, "use_multi_rank_bucket_allreduce round_robin_gradients ignore_unused_parameters"),
        (_SWITCH, _ZERO, "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"),
        (_SWITCH, _ZERO, "stage3_gather_16bit_weights_on_model_save memory_efficient_linear"),
        (_SWITCH, _ZERO, "log_trace_cache_warnings enable_sanity_checks"),
        (_NUMBER, _ZERO, "reduce_bucket_size stage3_prefetch_bucket_size stage3_max_reuse_distance"),
        (_NUMBER, _ZERO, "stage3_param_persistence_threshold stage3_model_persistence_threshold"),
        (_NUMBER, _ZERO, "stage3_max_live_parameters"),
        (_COUNT, _ZERO, "zero_hpz_partition_size sub_group_size allgather_bucket_size"),
        (_DEVICE, _OFFLOAD, "device"),
        (_SWITCH, _OFFLOAD, "pin_memory"),
        (_SWITCH, "comms_logger.", "enabled verbose prof_all debug"),
        (_SWITCH, _PROFILER, "enabled detailed"),
        (_NUMBER, _PROFILER, "recompute_fwd_factor profile_step module_depth top_modules"),
        (_TEXT, _PROFILER, "output_file"),
        (_LIST, "comms_logger.", "prof_ops"),
    )
    for key in keys.split()
}
"""Keys that this trainer works with."""

_SECTIONS = {key.rpartition(".")[0] for key in SUPPORTED}

_FILLED = ("bf16.enabled", "zero_optimization.zero_hpz_partition_size")
"""Keys whose ``auto`` is resolved here; elsewhere the default is used, or ``auto`` refused."""

_REFUSED: Mapping[str, str] = {
    section + key: reason
    for reason, section, keys in (
        ("is set by train.* of the run's configuration", "", "optimizer scheduler"),
        ("is not supported; enable bf16, or neither for fp32", "", "fp16 amp torch_autocast"),
        ("is not written; set train.trackers", "", "tensorboard wandb csv_monitor comet"),
        ("has no effect here; set train.activation_checkpointing", "", "activation_checkpointing"),
        ("is not supported; see data.*", "", "curriculum_learning data_efficiency dataloader_drop_last"),
        ("is not supported; dehvf_ds/plan.py says what fits", "", "autotuning"),
        ("is an old name; write bf16", "", "bfloat16"),
        ("is an old name; write offload_param", _ZERO, "cpu_offload cpu_offload_params"),
        ("would change the frozen weights", "", "quantize_training weight_quantization sparse_attention"),
        ("would change the frozen weights", "", "compression_training progressive_layer_drop"),
        ("would change the frozen weights", _ZERO, "zero_quantized_weights"),
        ("would change the frozen weights", _ZERO, "zero_quantized_nontrainable_weights"),
        ("is not supported", "", "sparse_gradients gradient_allreduce_op sequence_parallel_size nebula"),
        ("is not supported", "", "datastates_ckpt elastic_checkpoint eigenvalue zenflow pipeline aio"),
        ("is not supported", "", "tensor_parallel expert_parallel elasticity checkpoint compile"),
        ("is not supported", "", "hybrid_engine"),
        ("is not supported", _ZERO, "offload_optimizer offload_param.nvme_path zero_quantized_gradients"),
        ("is not needed: layers are gathered at once", _ZERO, "leaf_module"),
        ("is not needed: layers are gathered at once", _ZERO, "stage3_module_granularity_threshold"),
        ("is not supported", "bf16.", "immediate_grad_update bf16_optimizer_states"),
        ("is not supported", "bf16.", "bf16_master_weights_and_grads"),
    )
    for key in keys.split()
}
"""Keys of DeepSpeed that this trainer does not support, and why. Switched off they are accepted."""


def read_deepspeed_json(
    path: str, config: RunConfig, world_size: int, local_size: int | None = None
) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, by path or shipped name, and adds what the run's configuration owns.

    ``local_size`` is the number of ranks on a node, for hpZ's ``auto``; None means all. The result is for
    ``deepspeed.initialize`` and ``HfDeepSpeedConfig``.
    """
    file, train = find_deepspeed_json(path), config.train
    owned = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": ("the derived accumulation", train.accumulation(world_size)),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    try:
        text = file.read_text(encoding="utf-8-sig")
        given = parse_json(text, parse_constant=_refuse_constant)
        if not isinstance(given, dict):
            raise ValueError("not a JSON object")
        kept = dict(_checked(given, ""))
        for key, (setting, value) in owned.items():
            if kept.get(key, value) != value:
                raise ValueError(f"{key} is {kept[key]}, but {setting} is {value}; remove it from the JSON")
        _fill(kept, world_size, local_size or world_size)
        _check_with_deepspeed(kept)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {path}: {error}") from None
    return {"steps_per_print": 10**9} | kept | {key: value for key, (_, value) in owned.items()}


def compute_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a DeepSpeed configuration computes in: bf16 or fp32."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") is True else torch.float32


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _checked(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields supported keys and their values, without comments (``_...``) and what is switched off."""
    for key, value in section.items():
        name = prefix + key
        if key.startswith("_") or value is None or (name in _REFUSED and _is_off(value)):
            continue
        if name in _REFUSED:
            raise ValueError(f"{name} {_REFUSED[name]}; remove it from the JSON")
        if "." in key or (name not in SUPPORTED and name not in _SECTIONS):
            near = suggestion(name, [*SUPPORTED, *_SECTIONS, *_REFUSED])
            raise ValueError(f"{name} is not a supported key{near}")
        if name in SUPPORTED:
            kind = wanted, fits = SUPPORTED[name]
            is_auto = value == "auto"
            # These must be explicit: a default would silently decide how gradients are summed.
            if is_auto and name not in _FILLED and kind not in (_DTYPE, _DEVICE, _STAGE):
                continue
            if not fits(value) and not (is_auto and name in _FILLED):
                unquoted = ", without quotes" if isinstance(value, str) and '"' not in wanted else ""
                raise ValueError(f"{name} is {value!r}; it must be {wanted}{unquoted}")
            yield key, value
        elif isinstance(value, Mapping):
            yield key, dict(_checked(value, f"{name}."))
        else:
            raise ValueError(f"{name} is {value!r}, not a section in braces")


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        switches = [value[key] for key in ("enabled", "device") if key in value]
        return all(map(_is_off, switches or value.values()))
    return value in (None, False, "auto", "none", [])


def _fill(content: dict[str, Any], world_size: int, local_size: int) -> None:
    """Resolves what is ``auto``, and refuses what DeepSpeed would accept and get wrong."""
    zero, bf16 = content.get("zero_optimization", {}), content.get("bf16", {})
    stage, size = zero.get("stage"), zero.get("zero_hpz_partition_size", 1)
    if stage is None:
        raise ValueError("zero_optimization.stage is missing; it must be 1, 2 or 3 (on one GPU take 2)")
    if stage != 3 and zero.get("offload_param", {}).get("device") == "cpu":
        raise ValueError(f"zero_optimization.offload_param needs stage 3, but the stage is {stage}")
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = has_fast_bf16()
    if stage == 1 and bf16.get("enabled") and content.get("data_types") == {"grad_accum_dtype": "fp32"}:
        # DeepSpeed's optimizer for this case keeps its state where our checkpoints do not find it.
        raise ValueError("zero_optimization.stage 1 with bf16 and grad_accum_dtype fp32 fails; take stage 2")
    if size == "auto":
        # On a single node the second copy of the weights would cost memory for nothing.
        size = zero["zero_hpz_partition_size"] = local_size if local_size < world_size else 1
    if world_size > size and world_size % size:
        raise ValueError(
            f"zero_hpz_partition_size {size} does not divide the {world_size} ranks; set it to the GPUs of a "
            "node, or to auto"
        )


def _check_with_deepspeed(given: Mapping[str, Any]) -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # Its batch sizes depend on the ranks, which need not be connected yet.
    top = dict(given) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    top.pop("train_batch_size", None)
    try:
        DeepSpeedConfig(top)
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"DeepSpeed refuses it: {' '.join(str(error).split())}") from None
