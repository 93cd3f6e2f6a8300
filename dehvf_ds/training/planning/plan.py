"""From a run's configuration and a place to its plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from dehvf_ds.config import DEEPSPEED_DIR, RunConfig, UserError, find_deepspeed_json
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.planning.backbones import build_on_meta
from dehvf_ds.training.planning.estimate import Estimate, choose, estimate
from dehvf_ds.training.planning.inside import InsideBytes, inside_bytes
from dehvf_ds.training.planning.place import PlanConfig
from dehvf_ds.training.planning.shapes import Shapes, Work, count_shapes
from dehvf_ds.training.planning.zero import STRATEGIES, Strategy, Zero, gather_ranks, strategy_of

JSON_NAMES: dict[Strategy, str] = {
    "ZeRO-3": "zero3.json",
    "ZeRO-3 + hpZ": "zero3_hpz.json",
    "ZeRO-3 + offload": "zero3_offload.json",
    "ZeRO-2": "zero2.json",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is printed.

    Attributes:
        config: the run, its micro-batch made to divide.
        place: where it goes.
        shapes: the model.
        work: a micro-step.
        accumulation: micro-steps of an optimizer step.
        estimates: the configurations as the run is set.
        inside: of each, the memory while it evaluates inside the run; empty where it does not.
        recomputed: the same with activation checkpointing.
        chosen: the recommended one of both; None where nothing fits.
        notes: what was changed or taken from built-in sizes.
    """

    config: RunConfig
    place: PlanConfig
    shapes: Shapes
    work: Work
    accumulation: int
    estimates: list[Estimate]
    inside: list[InsideBytes]
    recomputed: list[Estimate]
    chosen: Estimate | None
    notes: list[str]


def build_plan(config: RunConfig, place: PlanConfig) -> Plan:
    """Computes the plan of a run.

    Raises:
        UserError: a backbone is neither to be read nor known, or a size does not fit.
    """
    notes: list[str] = []
    cluster = place.cluster
    config = _divisible(config, cluster.world, notes)
    zeros, size = _read_zero(config, place, notes)
    model = build_on_meta(config.model, notes)
    shapes = count_shapes(model, zeros["ZeRO-3"].persistence_threshold)
    tokens, rows = place.tokens or config.data.max_tokens, config.train.micro_batch_size
    accumulation = config.train.accumulation(cluster.world)
    work = Work(
        rows=rows,
        tokens=tokens,
        supervised=rows * (tokens - 1),
        element_bytes=size,
        checkpointing=config.train.activation_checkpointing,
    )
    estimates, recomputed = (
        [
            estimate(
                shapes,
                replace(work, checkpointing=checkpointing),
                zeros[strategy],
                strategy,
                cluster,
                accumulation=accumulation,
                overhead_bytes=place.overhead_bytes,
            )
            for strategy in STRATEGIES
        ]
        for checkpointing in (work.checkpointing, True)
    )
    return Plan(
        config=config,
        place=place,
        shapes=shapes,
        work=work,
        accumulation=accumulation,
        estimates=estimates,
        inside=[
            inside_bytes(
                shapes,
                strategy,
                zeros[strategy],
                config.eval,
                nodes=place.nodes,
                gpus_per_node=place.gpus_per_node,
                element_bytes=size,
                overhead_bytes=place.overhead_bytes,
            )
            for strategy in STRATEGIES
            if config.eval.every_steps
        ],
        recomputed=recomputed,
        chosen=choose([*estimates, *recomputed], place.limit_bytes),
        notes=notes,
    )


def _divisible(config: RunConfig, world: int, notes: list[str]) -> RunConfig:
    """Lowers the micro-batch to one that fills the global batch over these ranks."""
    train = config.train
    if train.global_batch_size % world:
        raise UserError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of {world} GPUs"
        )
    share = train.global_batch_size // world
    if share % train.micro_batch_size == 0:
        return config
    rows = next(n for n in range(min(share, train.micro_batch_size), 0, -1) if share % n == 0)
    notes.append(
        f"train.micro_batch_size {train.micro_batch_size} x {world} GPUs does not divide "
        f"train.global_batch_size {train.global_batch_size}; planned with {rows}: start with "
        f"--train.micro_batch_size {rows}"
    )
    return replace(config, train=replace(train, micro_batch_size=rows))


def _read_zero(config: RunConfig, place: PlanConfig, notes: list[str]) -> tuple[dict[Strategy, Zero], int]:
    """The sizes of each configuration's JSON, and bytes of a number in the compute dtype.

    The run's own JSON speaks for its configuration, the shipped ones for the others.
    """
    given = read_deepspeed_json(config.deepspeed, config, place.cluster.world, place.gpus_per_node)
    text = find_deepspeed_json(config.deepspeed).read_text(encoding="utf-8")
    bf16 = json.loads(text).get("bf16", {}).get("enabled", False)
    on_gpu = place.memory_bytes is not None
    size = 2 if bf16 is True or (bf16 == "auto" and on_gpu) else 4
    if size == 4 and on_gpu:
        notes.append(f"{config.deepspeed} computes in fp32, but the times are at the GPU's bf16 peak")
    zeros: dict[Strategy, Zero] = {}
    for strategy, name in JSON_NAMES.items():
        zeros[strategy] = Zero.from_json(json.loads((DEEPSPEED_DIR / name).read_text(encoding="utf-8")))
    strategy = strategy_of(given)
    zeros[strategy] = Zero.from_json(given)
    if strategy == "ZeRO-3 + hpZ":
        _note_hpz_size(config.deepspeed, given["zero_optimization"]["zero_hpz_partition_size"], place, notes)
    return zeros, size


def _note_hpz_size(path: str, given: int, place: PlanConfig, notes: list[str]) -> None:
    """Says where hpZ is planned with another size than the JSON's own."""
    ranks = gather_ranks("ZeRO-3 + hpZ", place.nodes, place.gpus_per_node)
    planned = ranks if ranks < place.cluster.world else 1
    if given != planned:
        notes.append(f"{path}: zero_hpz_partition_size {given} is planned as {planned}, auto's value here")
