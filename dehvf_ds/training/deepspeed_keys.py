"""Which keys of a DeepSpeed JSON this trainer works with, and what to do about the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from dehvf_ds.config import UserError

_BOOL, _NUMBER, _TEXT = "true or false", "a number", "a text"

_OFFLOAD = {"device": _TEXT, "pin_memory": _BOOL}
_ZERO = {
    "stage": _NUMBER,
    "overlap_comm": _BOOL,
    "contiguous_gradients": _BOOL,
    "reduce_scatter": _BOOL,
    "reduce_bucket_size": _NUMBER,
    "use_multi_rank_bucket_allreduce": _BOOL,
    "allgather_partitions": _BOOL,
    "allgather_bucket_size": _NUMBER,
    "round_robin_gradients": _BOOL,
    "sub_group_size": _NUMBER,
    "stage3_prefetch_bucket_size": _NUMBER,
    "stage3_param_persistence_threshold": _NUMBER,
    "stage3_model_persistence_threshold": _NUMBER,
    "stage3_max_live_parameters": _NUMBER,
    "stage3_max_reuse_distance": _NUMBER,
    "stage3_module_granularity_threshold": _NUMBER,
    "stage3_use_all_reduce_for_fetch_params": _BOOL,
    "stage3_allgather_sequential": _BOOL,
    "stage3_gather_16bit_weights_on_model_save": _BOOL,
    "zero_hpz_partition_size": _NUMBER,
    "memory_efficient_linear": _BOOL,
    "log_trace_cache_warnings": _BOOL,
    "enable_sanity_checks": _BOOL,
    "ignore_unused_parameters": _BOOL,
    "offload_param": _OFFLOAD,
}
SUPPORTED: Mapping[str, Any] = {
    "train_batch_size": _NUMBER,
    "train_micro_batch_size_per_gpu": _NUMBER,
    "gradient_accumulation_steps": _NUMBER,
    "gradient_clipping": _NUMBER,
    "bf16": {"enabled": _BOOL},
    "data_types": {"grad_accum_dtype": _TEXT},
    "zero_optimization": _ZERO,
    "communication_data_type": _TEXT,
    "prescale_gradients": _BOOL,
    "gradient_predivide_factor": _NUMBER,
    "zero_allow_untested_optimizer": _BOOL,
    "zero_force_ds_cpu_optimizer": _BOOL,
    "disable_allgather": _BOOL,
    "steps_per_print": _NUMBER,
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "dump_state": _BOOL,
    "comms_logger": {
        "enabled": _BOOL,
        "verbose": _BOOL,
        "prof_all": _BOOL,
        "debug": _BOOL,
        "prof_ops": "a list",
    },
    "flops_profiler": {
        "enabled": _BOOL,
        "recompute_fwd_factor": _NUMBER,
        "profile_step": _NUMBER,
        "module_depth": _NUMBER,
        "top_modules": _NUMBER,
        "detailed": _BOOL,
        "output_file": _TEXT,
    },
}
"""What a value must look like, by key; a dictionary for a section."""

_NUMBER_ABOVE_ZERO, _WHOLE_ABOVE_ZERO = "a number above 0", "a whole number above 0"
_ABOVE_ZERO = {
    "steps_per_print": _WHOLE_ABOVE_ZERO,
    "gradient_predivide_factor": _NUMBER_ABOVE_ZERO,
    "zero_optimization.zero_hpz_partition_size": _WHOLE_ABOVE_ZERO,
    "zero_optimization.sub_group_size": _WHOLE_ABOVE_ZERO,
    "zero_optimization.allgather_bucket_size": _WHOLE_ABOVE_ZERO,
}
"""Keys that DeepSpeed divides by, and does not check itself."""

_OWN_AUTO = (
    "bf16",
    "bf16.enabled",
    "communication_data_type",
    "data_types.grad_accum_dtype",
    "zero_optimization",
    "zero_optimization.stage",
    "zero_optimization.offload_param",
    "zero_optimization.offload_param.device",
    "zero_optimization.zero_hpz_partition_size",
)
"""Keys whose ``auto`` is decided by this trainer, or refused."""

_OURS = "is set by train.* of the run's configuration"
_METRICS = "is not written: a run has metrics.jsonl and tensorboard/ of its own"
_FROZEN = "would change the frozen weights"
_ORDER = "is not supported: data.* orders the samples"
_ZERO_ALONE = "is not supported: ZeRO shares the model out"
_CHECKPOINTS = "is not supported: a run has checkpoints of its own"
_NVME = 'nvme is not supported; "cpu" keeps the weights in host memory'

REFUSED = {
    "optimizer": _OURS,
    "scheduler": _OURS,
    "fp16": "is not supported; enable bf16, or neither for fp32",
    "amp": "is not supported; enable bf16, or neither for fp32",
    "torch_autocast": "is not supported; enable bf16, or neither for fp32",
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "csv_monitor": _METRICS,
    "comet": _METRICS,
    "activation_checkpointing": "has no effect here; set train.activation_checkpointing",
    "compile": "has no effect here",
    "sparse_gradients": "is not supported: nothing sparse is trained",
    "gradient_allreduce_op": "is not supported: gradients are averaged",
    "curriculum_learning": _ORDER,
    "data_efficiency": _ORDER,
    "dataloader_drop_last": _ORDER,
    "compression_training": _FROZEN,
    "quantize_training": _FROZEN,
    "weight_quantization": _FROZEN,
    "pipeline": _ZERO_ALONE,
    "tensor_parallel": _ZERO_ALONE,
    "expert_parallel": _ZERO_ALONE,
    "sequence_parallel_size": _ZERO_ALONE,
    "elasticity": "is not supported: a run goes on from its checkpoint on any number of ranks",
    "autotuning": "is not supported; dehvf_ds/plan.py says what fits",
    "aio": _NVME,
    "checkpoint": _CHECKPOINTS,
    "nebula": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "hybrid_engine": "is not supported",
    "progressive_layer_drop": "is not supported: every layer of the frozen model runs",
    "eigenvalue": "is not supported",
    "sparse_attention": "is not supported: attention is the frozen model's own",
    "bfloat16": "is an old name; write bf16",
    "zero_optimization.offload_optimizer": "is not supported: the optimizer's states of what is trained are "
    "some 10 MB a million parameters, over all ranks",
    "zero_optimization.cpu_offload": "is an old name, and not supported; see offload_param",
    "zero_optimization.cpu_offload_param": "is an old name; write offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "is an old name; write offload_param.pin_memory",
    "zero_optimization.zenflow": "is not supported: it is of offload_optimizer",
    "zero_optimization.zero_quantized_weights": _FROZEN,
    "zero_optimization.zero_quantized_nontrainable_weights": _FROZEN,
    "zero_optimization.zero_quantized_gradients": "is not supported",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "bf16.immediate_grad_update": "is not supported",
    "bf16.bf16_master_weights_and_grads": "is not supported: trained weights are kept in fp32",
    "bf16.bf16_optimizer_states": "is not supported: trained weights are kept in fp32",
}
"""Keys that DeepSpeed knows and this trainer does without, and why. Switched off they may stand there."""


def check_keys(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Checks every key and the look of every value.

    Args:
        given: the JSON's content.
        path: the file, for the messages.

    Returns:
        A copy of the content without comments (keys that begin with ``_``) and without what is switched off.

    Raises:
        UserError: names the first key that is not supported or has a value of another kind.
    """
    kept = _checked(given, SUPPORTED, "", path)
    zero = kept.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or stage not in (1, 2, 3):
        # Without ZeRO, DeepSpeed takes steps of NaN gradients, and in bf16 keeps no fp32 weights.
        is_now = f"is {stage!r}" if "stage" in zero else "is missing"
        raise UserError(f"{path}: zero_optimization.stage {is_now}; it must be 1, 2 or 3 (on one GPU take 2)")
    device = zero.get("offload_param", {}).get("device", "none")
    if device not in ("none", "cpu"):
        raise UserError(
            f"{path}: zero_optimization.offload_param.device is {device!r}; "
            + (_NVME if device == "nvme" else 'it must be "cpu" or "none"')
        )
    if device == "cpu" and stage != 3:
        raise UserError(f"{path}: zero_optimization.offload_param is of stage 3, and the stage is {stage}")
    for key, value in (
        ("communication_data_type", kept.get("communication_data_type")),
        ("data_types.grad_accum_dtype", kept.get("data_types", {}).get("grad_accum_dtype")),
    ):
        if value not in (None, "fp32", "bf16"):
            raise UserError(f'{path}: {key} is {value!r}; it must be "fp32" or "bf16"')
    return kept


def _checked(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str, path: str) -> dict[str, Any]:
    kept = {}
    for key, value in section.items():
        name = prefix + key
        # DeepSpeed takes an "auto" for its default in some sections; elsewhere it is a text to it, and true.
        if (
            key.startswith("_")
            or value is None
            or (value == "auto" and key in known and name not in _OWN_AUTO)
        ):
            continue
        if key not in known:
            if _is_off(value) and name in REFUSED:
                continue
            if name in REFUSED:
                raise UserError(f"{path}: {name} {REFUSED[name]}; remove it from the JSON")
            names = [*known, *(other.removeprefix(prefix) for other in REFUSED if other.startswith(prefix))]
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path}: {name} is no key that is supported here{hint}")
        wanted = known[key]
        if isinstance(wanted, Mapping):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}: {name} is {value!r}, not a section in braces")
            kept[key] = _checked(value, wanted, f"{name}.", path)
        elif value == "auto" or (_looks(value, wanted) and _in_range(value, name)):
            kept[key] = value
        else:
            if _looks(value, wanted):
                wanted = _ABOVE_ZERO[name]
            raise UserError(f"{path}: {name} is {value!r}; it must be {wanted}{_unquoted(value, wanted)}")
    return kept


def _looks(value: Any, wanted: str) -> bool:
    if wanted == _BOOL:
        return isinstance(value, bool)
    if wanted == _NUMBER:
        # No key takes a negative number but the profiler's depth, where -1 is all.
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -1 <= value < 1e18
    return isinstance(value, str if wanted == _TEXT else list)


def _in_range(value: Any, name: str) -> bool:
    if name not in _ABOVE_ZERO:
        return True
    return value > 0 and (_ABOVE_ZERO[name] == _NUMBER_ABOVE_ZERO or float(value).is_integer())


def _unquoted(value: Any, wanted: str) -> str:
    return ", without quotes" if isinstance(value, str) and wanted in (_BOOL, _NUMBER) else ""


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        if "enabled" in value:
            return value["enabled"] in (False, "auto", None)
        if "device" in value:
            return value["device"] in ("none", None)
        return all(_is_off(inner) for inner in value.values())
    return value is None or value is False or value in ("auto", [], "none")
