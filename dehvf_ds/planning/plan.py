"""Makes the plan of a run, and prints it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig

from dehvf_ds.config import DEEPSPEED_DIR, ModelConfig, RunConfig, UserError, find_deepspeed_json
from dehvf_ds.data.collate import build_image_transform
from dehvf_ds.model import DehvfConfig
from dehvf_ds.planning.estimate import (
    GB,
    LINK_SHARE,
    Estimate,
    PlanConfig,
    choose,
    estimate,
    evaluation_bytes,
)
from dehvf_ds.planning.memory import (
    GIB,
    JSON_NAMES,
    USABLE_SHARE,
    MicroStep,
    Parameters,
    Sharding,
    build_on_meta,
    checkpoint_bytes,
    count_parameters,
    full_batch,
    run_micro_step,
)
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import build_model_config
from dehvf_ds.training.metrics import GPUS


def _sizes(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True))


# Published sizes, by the last part of a path or hub id, so that a plan needs no download.
BACKBONES: dict[str, PreTrainedConfig] = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(**_sizes(5120, 13824, 40, 40)),
    "smollm2-135m": LlamaConfig(
        **_sizes(576, 1536, 30, 9), vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "clip-vit-large-patch14": CLIPVisionConfig(**_sizes(1024, 4096, 24, 16), image_size=224, patch_size=14),
    "dinov2-small": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
}
ALIASES = {"clip-vit-l14": "clip-vit-large-patch14", "dinov2-s14": "dinov2-small"}
IMAGE_SIZE = 224
"""Side of the pictures that these towers' processors make."""

CAPTIONS = 5
"""Assumed captions of a picture, as most of COCO's have."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is printed."""

    config: RunConfig
    """with a micro-batch that divides the global batch"""
    place: PlanConfig
    model_config: DehvfConfig
    parameters: Parameters
    dtype: torch.dtype
    """the compute dtype"""
    step: MicroStep
    """under ZeRO-3"""
    estimates: list[Estimate]
    """of the DeepSpeed configurations"""
    recomputed: list[Estimate]
    """likewise with activation checkpointing"""
    evaluations: list[dict[str, int]]
    """likewise memory during an in-training evaluation; empty if there is none"""
    chosen: Estimate | None
    """the recommended one; None if nothing fits"""
    notes: list[str]
    """what was changed or taken from built-in sizes"""


def build_plan(config: RunConfig, place: PlanConfig) -> Plan:
    """Computes the plan of a run."""
    notes: list[str] = []
    config = _divisible(config, place.world, notes)
    shardings, dtype = _read_shardings(config, place, notes)
    model_config = read_model_config(config.model, notes)
    train = config.train
    rows, tokens = train.micro_batch_size, place.tokens or config.data.max_tokens
    batch, accumulation = full_batch(model_config, rows, tokens), train.accumulation(place.world)
    model = build_on_meta(model_config, dtype, checkpointing=train.activation_checkpointing)
    parameters = count_parameters(model, shardings[0].zero.param_persistence_threshold)

    captions = CAPTIONS if config.data.task == "caption" else 1
    passes = math.ceil(captions / config.data.captions_together) / captions
    if passes < 1:
        notes.append(
            f"time is planned with {passes:g} tower passes a row, memory with one: of {CAPTIONS} captions a "
            f"picture, data.captions_together {config.data.captions_together} meet"
        )
    steps = {
        zero3: run_micro_step(model, batch, zero3=zero3).with_shared_pictures(passes)
        for zero3 in (True, False)
    }
    estimates = recomputed = [
        estimate(parameters, steps[s.strategy != "ZeRO-2"], s, place, accumulation=accumulation)
        for s in shardings
    ]
    if not train.activation_checkpointing:
        model = build_on_meta(model_config, dtype, checkpointing=True)
        # Also for ZeRO-2: the inputs that one layer keeps under ZeRO-3 are negligible.
        step = run_micro_step(model, batch, zero3=True).with_shared_pictures(passes)
        recomputed = [estimate(parameters, step, s, place, accumulation=accumulation) for s in shardings]
    return Plan(
        config=config,
        place=place,
        model_config=model_config,
        parameters=parameters,
        dtype=dtype,
        step=steps[True],
        estimates=estimates,
        recomputed=recomputed,
        evaluations=[
            evaluation_bytes(model_config, parameters, s, config.eval)
            for s in shardings
            if config.eval.every_steps
        ],
        chosen=choose([*estimates, *recomputed], place.limit_bytes),
        notes=notes,
    )


def read_model_config(settings: ModelConfig, notes: list[str]) -> DehvfConfig:
    """Reads the backbones' configuration files, or takes built-in sizes for known names without files."""
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for part in ("language_model", "vision_tower"):
            source = getattr(settings, part)
            name = Path(source).name.lower()
            known = BACKBONES.get(ALIASES.get(name, name))
            if known is not None and not Path(source).is_dir():
                paths[part] = str(Path(directory) / part)
                known.save_pretrained(paths[part])
                notes.append(f"model.{part} {source} is no directory here: built-in sizes")
        image_size = settings.image_size or IMAGE_SIZE
        if "vision_tower" not in paths:
            image_size = build_image_transform(settings.vision_tower, settings.image_size).image_size
        return build_model_config(replace(settings, **paths), image_size=image_size)


def _divisible(config: RunConfig, world: int, notes: list[str]) -> RunConfig:
    """Lowers the micro-batch until it divides the global batch over these ranks."""
    train = config.train
    if train.global_batch_size % world:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of {world} GPUs"
        )
    share, captions = train.global_batch_size // world, config.data.captions_together
    if share % train.micro_batch_size == 0:
        return config
    if share % captions:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} over {world} GPUs is not a multiple of "
            f"data.captions_together {captions}"
        )
    most = min(share, train.micro_batch_size)
    rows = next(n for n in range(most // captions * captions, 0, -captions) if share % n == 0)
    notes.append(
        f"train.micro_batch_size {train.micro_batch_size} x {world} GPUs does not divide "
        f"train.global_batch_size {train.global_batch_size}; planned with {rows}: start with "
        f"--train.micro_batch_size {rows}"
    )
    return replace(config, train=replace(train, micro_batch_size=rows))


def _read_shardings(
    config: RunConfig, place: PlanConfig, notes: list[str]
) -> tuple[list[Sharding], torch.dtype]:
    """The four configurations and the compute dtype: the run's own JSON, the shipped ones for the others."""
    own_json = read_deepspeed_json(config.deepspeed, config, place.world, place.gpus_per_node)
    # From the file, since "auto" has been filled in for this machine, not for the planned one.
    bf16 = _read_json(find_deepspeed_json(config.deepspeed)).get("bf16", {}).get("enabled", False)
    on_gpu = place.memory_bytes is not None
    dtype = torch.bfloat16 if bf16 is True or (bf16 == "auto" and on_gpu) else torch.float32
    if dtype == torch.float32 and on_gpu:
        notes.append(f"{config.deepspeed} computes in fp32, but the times are at the GPU's bf16 peak")
    spread = partial(Sharding.read, nodes=place.nodes, gpus_per_node=place.gpus_per_node)
    found = {name: spread(_read_json(DEEPSPEED_DIR / file)) for name, file in JSON_NAMES.items()}
    own = spread(own_json)
    found[own.strategy] = own
    planned = own.gather_ranks if own.gather_ranks < place.world else 1
    size = own.zero.zero_hpz_partition_size
    if own.strategy == "ZeRO-3 + hpZ" and size != planned:
        notes.append(
            f"{config.deepspeed}: zero_hpz_partition_size {size} is planned as {planned}, auto's value here"
        )
    return [replace(s, strategy=name, element_bytes=dtype.itemsize) for name, s in found.items()], dtype


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- as text ---


def print_plan(plan: Plan) -> None:
    """Prints the plan: tables on a terminal, otherwise aligned lines."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("\n".join(_head_lines(plan)), markup=False)
    recompute = "on" if plan.config.train.activation_checkpointing else "off"
    _print_table(f"Memory of one GPU in GiB (activation checkpointing {recompute})", _memory_rows(plan))
    _print_table("Time and traffic of one optimizer step", _time_rows(plan))
    console.print("\n".join(_foot_lines(plan)), markup=False)


def _print_table(title: str, rows: list[list[str]]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    drawn = box.HEAVY_HEAD if console.is_terminal else None
    table = Table("", box=drawn, pad_edge=console.is_terminal)
    for strategy in JSON_NAMES:
        table.add_column(strategy, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", markup=False)
    console.print(table)


def _head_lines(plan: Plan) -> list[str]:
    p, place, train = plan.parameters, plan.place, plan.config.train
    return [
        f"{plan.config.run_dir}: {place.nodes} x {place.gpus_per_node} {place.gpu}, "
        f"fusion {plan.model_config.fusion}",
        f"parameters: LLM {p.language / 1e9:.3f} B, tower {p.tower / 1e9:.3f} B frozen; "
        f"trainable {p.trainable:,} ({p.lora:,} in LoRA)",
        f"step: {train.global_batch_size} rows = {place.world} GPUs x {plan.step.rows} rows x "
        f"{train.accumulation(place.world)} micro-steps; "
        f"{place.tokens or plan.config.data.max_tokens} tokens a row, "
        f"{plan.model_config.num_slots} visual tokens a feature layer, "
        f"{'bf16' if plan.dtype == torch.bfloat16 else 'fp32'}",
        *(f"note: {note}" for note in plan.notes),
    ]


def _memory_rows(plan: Plan) -> list[list[str]]:
    estimates, memory = plan.estimates, plan.place.memory_bytes
    parts = {name: [e.memory[name] for e in estimates] for name in estimates[0].memory}
    parts["total"] = [e.total_bytes for e in estimates]
    if not plan.config.train.activation_checkpointing:
        parts["activations, checkpointing"] = [e.memory["activations"] for e in plan.recomputed]
        parts["total, checkpointing"] = [e.total_bytes for e in plan.recomputed]
    if plan.evaluations:
        overhead = plan.place.overhead_bytes
        parts["full model for evaluation"] = [held["the full model"] for held in plan.evaluations]
        parts["total while it evaluates"] = [sum(held.values()) + overhead for held in plan.evaluations]
    for when in estimates[0].host:
        parts[f"host of a node, {when}"] = [e.host[when] for e in estimates]
    rows = [[name, *(f"{value / GIB:.2f}" for value in values)] for name, values in parts.items()]
    if memory is not None:
        shares = [f"{e.total_bytes / memory:.0%}" for e in estimates]
        rows.insert(list(parts).index("total") + 1, [f"share of {memory / GIB:.0f} GiB", *shares])
    return rows


def _time_rows(plan: Plan) -> list[list[str]]:
    def row(name: str, text: Callable[[Estimate], str]) -> list[str]:
        return [name, *(text(e) for e in plan.estimates)]

    rows_a_step = plan.config.train.global_batch_size
    return [
        row(f"arithmetic at MFU {plan.place.mfu:g}, s", lambda e: f"{e.arithmetic_s:.3f}"),
        row("frozen weights received, GB a GPU", lambda e: f"{e.gather_bytes / GB:.1f}"),
        row("  time, s", lambda e: f"{e.gather_s:.3f}"),
        row("trainables and gradients, GB a GPU", lambda e: f"{e.gradient_traffic_bytes / GB:.3f}"),
        row("  time, s", lambda e: f"{e.gradient_traffic_s:.4f}"),
        row("step, s", lambda e: f"{e.step_s:.3f}"),
        row("rows a second, all GPUs", lambda e: f"{rows_a_step / e.step_s:.0f}"),
        row("micro-batch that hides the gathers", lambda e: str(e.hiding_rows) if e.gather_s else "-"),
    ]


def _foot_lines(plan: Plan) -> list[str]:
    place = plan.place
    within, between, to_host = place.links_gb_s
    peak = GPUS[place.gpu].peak_flops / 1e12
    times = place.world * plan.config.train.accumulation(place.world)
    return [
        "",
        f"TFLOP of a step, all GPUs: {times * plan.step.flops / 1e12:.1f} "
        f"({times * plan.step.tower_flops / 1e12:.1f} in the vision tower)",
        f"checkpoint: {checkpoint_bytes(plan.parameters) / 1e6:.0f} MB (fp32 masters, two moments, adapter)",
        f"recommended: {_recommendation(plan)}",
        "",
        "Computed: parameters, states, buckets of the JSONs and traffic from their sizes; activations and",
        "  FLOPs by a step of the whole model without values (benchmarks/memory.py measures a real one).",
        f"Assumed: MFU {place.mfu:g} of {peak:g} TFLOP/s; GB/s per GPU and direction:",
        f"  {within:g} within a node, {between:g} between nodes, {to_host:g} to the host;",
        f"  rings over all links at {LINK_SHARE:.0%} of their speed, gathers overlapping with arithmetic;",
        f"  {place.overhead_bytes / GIB:g} GiB for CUDA, NCCL, workspaces; a GPU {USABLE_SHARE:.0%} full;",
        "  rows of full length, padded, every token supervised (upper bounds); SDPA attention without a",
        "  stored score matrix; weights in safetensors files, each read to where it is kept;",
        "  the loader's host memory not counted.",
    ]


def _recommendation(plan: Plan) -> str:
    chosen, limit = plan.chosen, plan.place.limit_bytes
    if chosen is None:
        least = min(plan.recomputed, key=lambda e: e.total_bytes)
        return (
            f"nothing fits; the least is {least.strategy} with activation checkpointing, "
            f"{least.total_bytes / GIB:.1f} GiB. Use a smaller train.micro_batch_size, more or larger GPUs"
        )
    name, zero3 = chosen.strategy, plan.estimates[0]
    if chosen.checkpointing and not plan.config.train.activation_checkpointing:
        name += " with --train.activation_checkpointing true"
    gathers = f"{zero3.gather_s:.3f} s against {zero3.arithmetic_s:.3f} s of arithmetic"
    if chosen.strategy == "ZeRO-2":
        reason = "it gathers nothing, and one GPU holds the frozen weights"
        if zero3.gather_s > 0:
            saved = (chosen.total_bytes - zero3.total_bytes) / GIB
            reason += f"; ZeRO-3 takes {saved:.0f} GiB less, and its gathers {gathers}"
    elif chosen.gather_s > chosen.arithmetic_s:
        reason = f"the fastest that fits; its gathers hide from {chosen.hiding_rows} rows a micro-step"
    else:
        reason = "it fits, and its gathers hide behind arithmetic"
    if limit is not None:
        reason += f"; {(limit - chosen.total_bytes) / GIB:.0f} GiB to spare"
    return f"{name} ({JSON_NAMES[chosen.strategy]}): {reason}"
