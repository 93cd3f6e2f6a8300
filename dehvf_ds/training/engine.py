"""From a configuration to a DeepSpeed engine: precision, partitioned backbones, optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dehvf_ds.config import ModelConfig, RunConfig, UserError, to_plain
from dehvf_ds.distributed import World, has_fast_bf16
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.artifact import load_adapter
from dehvf_ds.model.weights import build_config, find_adapter, load_model
from dehvf_ds.training.optim import parameter_groups


def read_deepspeed_json(
    path: str, config: RunConfig, world_size: int, local_size: int | None = None
) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and completes it with what our configuration owns.

    Args:
        path: the JSON file.
        config: the run; owner of batch sizes, clipping, optimizer and schedule.
        world_size: ranks of the job.
        local_size: ranks of a node, for hpZ's ``auto``; None means all are of one node.

    Returns:
        A configuration for ``deepspeed.initialize`` and ``HfDeepSpeedConfig``.

    Raises:
        UserError: no such file, not JSON, or a key that contradicts our configuration.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--deepspeed {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path}: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"--deepspeed {path}: not a JSON object")
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
    if isinstance(given.get("bf16"), dict) and given["bf16"].get("enabled") == "auto":
        given["bf16"] = given["bf16"] | {"enabled": has_fast_bf16()}
    _fill_hpz(path, given, world_size, local_size or world_size)
    given |= {key: value for key, (_, value) in owned.items()}
    given.setdefault("zero_optimization", {"stage": 0})
    given.setdefault("steps_per_print", 10**9)
    return given


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype that a DeepSpeed configuration computes in: bf16 or fp32."""
    return torch.bfloat16 if _enabled(ds_config, "bf16") else torch.float32


def build_model_config(
    config: ModelConfig, *, image_size: int | None = None, prompt: str | None = None
) -> DehvfConfig:
    """The model's configuration over the run's backbones, checked; reads their configuration files alone.

    Args:
        config: the run's model settings.
        image_size: side of the pictures that the tower's processor makes; None takes the tower's own.
        prompt: instruction that the run trains with, kept for those who generate.

    Raises:
        UserError: a backbone cannot be read or a size does not fit it.
    """
    try:
        built = build_config(
            config.language_model,
            config.vision_tower,
            num_levels=config.num_levels,
            fusion=config.fusion,
            router=config.router,
            levels=config.levels,
            rank=config.rank,
            router_dim=config.router_dim,
            image_size=image_size,
            prompt=prompt,
            prefix_tokens=config.prefix_tokens,
            lora=to_plain(config.lora) if config.lora.rank else None,
        )
        # Without weights, to find out in a second whether the decoder has the structure that is needed.
        with torch.device("meta"):
            DehvfForConditionalGeneration(built)
    except ValueError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None
    return built


def build_engine(
    config: RunConfig, model_config: DehvfConfig, ds_config: dict[str, Any], world: World
) -> tuple[Any, DehvfForConditionalGeneration]:
    """Loads the frozen backbones, partitioned under ZeRO-3, and starts the engine.

    Returns:
        The DeepSpeed engine and the model inside it.

    Raises:
        UserError: a backbone's checkpoint does not fit.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    dtype = compute_dtype(ds_config)
    _share_hpz_groups()
    # Only referenced weakly by transformers: it must live until the weights are loaded.
    partitioning = HfDeepSpeedConfig(ds_config)
    try:
        model = load_model(
            model_config,
            config.model.language_model,
            config.model.vision_tower,
            dtype=dtype,
            seed=config.seed,
        )
    except ModelError as error:
        raise UserError(str(error)) from None
    del partitioning
    if config.init_from is not None:
        try:
            # Now, while the parameters are whole.
            load_adapter(model, find_adapter(config.init_from))
        except ModelError as error:
            raise UserError(f"--init_from {config.init_from}: {error}") from None
    if config.train.activation_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = model.trainable_parameters()
    # With partitioned weights around, DeepSpeed moves and casts nothing itself.
    for parameter in trainable.values():
        parameter.data = parameter.data.to(world.device)
    buffers = {name: buffer.to(world.device) for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(
        parameter_groups(trainable, config.train.weight_decay),
        lr=config.train.lr,
        betas=config.train.betas,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    # On the device, which DeepSpeed sees to only where nothing is partitioned, and in their own dtype: rotary
    # frequencies must stay fp32, and DeepSpeed did not always leave buffers out of its cast to bf16.
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    engine.train()
    return engine, model


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


def _share_hpz_groups() -> None:
    """Lets hpZ load two backbones: DeepSpeed makes its groups in each load, and asserts there are none yet.

    DeepSpeed issues 4901 and 7066, in 0.19.8.
    """
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group

    def create_once(group_size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(group_size)

    groups._create_zero_param_parallel_group = create_once


def _enabled(ds_config: dict[str, Any], precision: str) -> bool:
    return ds_config.get(precision, {}).get("enabled", False) is True
