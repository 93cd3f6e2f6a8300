"""From a configuration to a DeepSpeed engine: precision, partitioned backbones, optimizer."""

from __future__ import annotations

from typing import Any

import torch

from dehvf_ds.config import ModelConfig, RunConfig, UserError, to_plain
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import find_adapter, load_adapter
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.optim import parameter_groups


def build_model_config(
    config: ModelConfig,
    *,
    image_size: int | None = None,
    task: str | None = None,
    prompt: str | None = None,
) -> DehvfConfig:
    """The model's configuration over the run's backbones, checked; reads their configuration files alone.

    ``image_size`` is the side of the pictures that the tower's processor makes, None the tower's own;
    ``task`` and ``prompt`` are kept for those who generate.
    """
    try:
        built = build_config(
            config.language_model,
            config.vision_tower,
            num_feature_layers=config.num_feature_layers,
            fusion=config.fusion,
            router=config.router,
            feature_layers=config.feature_layers,
            rank=config.rank,
            router_dim=config.router_dim,
            image_size=image_size,
            task=task,
            prompt=prompt,
            prefix_tokens=config.prefix_tokens,
            lora=to_plain(config.lora) if config.lora.rank else None,
        )
        # Without weights, to find out in a second whether the decoder has the structure that is needed.
        with torch.device("meta"):
            DehvfForConditionalGeneration(built)
    except ModelError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        # What transformers raises at a value of a config.json that it has no code for.
        raise UserError(
            f"model: no model can be built of the config.json of {config.language_model} and "
            f"{config.vision_tower}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    return built


def build_engine(
    config: RunConfig, model_config: DehvfConfig, ds_config: dict[str, Any], world: World
) -> tuple[Any, DehvfForConditionalGeneration]:
    """Loads the frozen backbones, partitioned under ZeRO-3, and starts the engine around the model."""
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
            device=None if ds_config["zero_optimization"]["stage"] == 3 else world.device,
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
        model.recompute_layers()
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
