"""From a configuration to a DeepSpeed engine: partitioned backbones, optimizer, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dehvf_ds.config import ModelConfig, RunConfig, TrainConfig, UserError, to_plain
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapter import find_adapter, load_adapter
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.model.ffn import decoder_layers
from dehvf_ds.training.deepspeed_json import compute_dtype
from dehvf_ds.training.zero import Zero3Partitions, gathered_units, numel

_linear = F.linear
"""torch's own, before ZeRO-3 puts another in its place"""


def build_model_config(
    config: ModelConfig,
    *,
    image_size: int | None = None,
    task: str | None = None,
    prompt: str | None = None,
) -> DehvfConfig:
    """The model's configuration over the run's backbones, checked; no weights are read.

    ``image_size`` is the side of the pictures that the tower's processor makes, None the tower's own;
    ``task`` and ``prompt`` are stored for generation.
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
        # Without weights this takes a second, and checks that the decoder has the structure that is needed.
        with torch.device("meta"):
            DehvfForConditionalGeneration(built)
    except ModelError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        # What transformers raises for a value in a config.json that it does not support.
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

    dtype = compute_dtype(ds_config)
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    try:
        model = load_model(
            model_config,
            config.model.language_model,
            config.model.vision_tower,
            dtype=dtype,
            seed=config.seed,
            device=None if partitioned else world.device,
            partitions=Zero3Partitions(ds_config, world) if partitioned else None,
        )
    except ModelError as error:
        raise UserError(str(error)) from None
    if config.init_from is not None:
        try:
            # Before DeepSpeed partitions the trainables.
            load_adapter(model, find_adapter(config.init_from))
        except ModelError as error:
            raise UserError(f"--init_from {config.init_from}: {error}") from None
    if config.train.activation_checkpointing:
        model.recompute_layers()
    if config.train.compile:
        compile_units(model, partitioned=partitioned)
    trainable = model.trainable_parameters()
    # Where weights are partitioned, DeepSpeed moves and casts nothing itself.
    for parameter in trainable.values():
        parameter.data = parameter.data.to(world.device)
    buffers = {name: buffer.to(world.device) for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(
        parameter_groups(trainable, config.train.weight_decay),
        lr=config.train.lr,
        betas=config.train.betas,
    )
    if partitioned:
        ds_config = ds_config | {"zero_optimization": _gather_by_unit(model) | ds_config["zero_optimization"]}
    with _reduction_by_parameter():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if partitioned:
        _keep_frozen_whole(engine)
    # DeepSpeed moves buffers to the device only where nothing is partitioned, and some versions cast them to
    # bf16; rotary frequencies must stay fp32.
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    engine.train()
    return engine, model


def compile_units(
    model: DehvfForConditionalGeneration, *, partitioned: bool = False, backend: str = "inductor"
) -> None:
    """Compiles the decoder's layers and the tower's blocks for training, each kind of layer once.

    What is compiled lies inside the hooks with which ZeRO-3 gathers a unit, so those stay as they are. The
    reader of the memory is shared by all layers and gathered by hooks of its own, so where weights are
    ``partitioned`` it stays outside of the graphs. In evaluation mode a unit runs as it did: decoding would
    be compiled for every length of its cache.
    """
    if partitioned and model.config.fusion == "ffn":
        reader = torch.compiler.disable(model.reader.__call__)
        for layer in decoder_layers(model.language_model):
            layer.mlp.read_by(reader)
    for unit in gathered_units(model):
        unit.forward = _compiled_in_training(unit, backend, _plain_linear if partitioned else nullcontext)


@contextmanager
def _plain_linear() -> Iterator[None]:
    """Takes torch's linear map again in the place of ZeRO-3's.

    That one keeps no copy of a gathered weight for backward, which a graph does not either; its look at each
    weight's partition would have every layer compiled anew.
    """
    partitioning, F.linear = F.linear, _linear
    try:
        yield
    finally:
        F.linear = partitioning


def _compiled_in_training(
    unit: nn.Module, backend: str, within: Callable[[], AbstractContextManager[object]]
) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed

    plain = body = unit.forward
    # Recent versions of transformers put recomputation around `forward`, older ones around `__call__`.
    wraps_forward = isinstance(unit, GradientCheckpointingLayer) and "__init_subclass__" in vars(
        GradientCheckpointingLayer
    )
    if wraps_forward:
        body = type(unit).forward.__wrapped__.__get__(unit)
    compiled = torch.compile(body, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with within():
                return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            reason = str(error).split("\n\n")[0]
            raise UserError(f"train.compile: {reason}; without a compiler, set it to false") from error

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not unit.training:
            return plain(*args, **kwargs)
        if wraps_forward and unit.gradient_checkpointing:
            # Around what is compiled: within, a graph that ends early would leave the layer as it was.
            checkpoint: Any = unit._gradient_checkpointing_func
            return checkpoint(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    return forward


def _gather_by_unit(model: DehvfForConditionalGeneration) -> dict[str, int]:
    """Has ZeRO-3 gather a decoder layer or a tower's block at once, with one pair of hooks.

    Returns the setting that lets DeepSpeed gather one of them ahead of use, whole.
    """
    from deepspeed.utils import set_z3_leaf_module

    units = gathered_units(model)
    for unit in units:
        set_z3_leaf_module(unit, True)
    return {"stage3_prefetch_bucket_size": max(sum(map(numel, unit.parameters())) for unit in units)}


@contextmanager
def _reduction_by_parameter() -> Iterator[None]:
    """Has ZeRO-3 take each gradient when it is there, also within units that are gathered at once.

    DeepSpeed 0.19.8 takes a unit's in a backward hook of the module. Where no input of the module needs a
    gradient (the first layer) it fires before there are any, and DeepSpeed puts zeros in their place.
    """
    from deepspeed.runtime.zero import stage3

    own, stage3.z3_leaf_parameter = stage3.z3_leaf_parameter, lambda _: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = own


def _keep_frozen_whole(engine: Any) -> None:
    """Leaves frozen weights alone that every rank keeps whole, being small.

    DeepSpeed 0.19.8 partitions and gathers them in every step, like those that the step has changed.
    """
    from deepspeed.runtime.zero.partition_parameters import _init_external_params

    others = nn.ParameterList(p for p in engine.module.parameters() if p.requires_grad or not p.ds_persist)
    _init_external_params(others)
    release = engine.optimizer.parameter_offload.get_param_coordinator().release_and_reset_all
    engine.optimizer._partition_all_parameters = lambda: release(others)


def learning_rate(step: int, config: TrainConfig, num_steps: int) -> float:
    """Learning rate of a step (0 is the first): linear warm-up, then a cosine to ``min_lr_ratio``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """AdamW's groups, to be made before ZeRO partitions: weight decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_learning_rate(groups: Iterable[dict], lr: float) -> None:
    """Sets one learning rate in all groups."""
    for group in groups:
        group["lr"] = lr


class GradientWatch:
    """Finds trainables that get no gradient, by hooks on each.

    Under ZeRO a trainable without a gradient is silently stepped with its previous one. A gradient of zero is
    fine; an absent one is a bug in the model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._silent = set(parameters)
        self._handles = [
            parameter.register_hook(lambda _grad, name=name: self._silent.discard(name))
            for name, parameter in parameters.items()
        ]

    def finish(self) -> list[str]:
        """Removes the hooks and returns the names of trainables whose hook never fired, sorted."""
        for handle in self._handles:
            handle.remove()
        return sorted(self._silent)
