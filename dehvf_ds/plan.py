"""Says what a run will need before it is queued: memory, time and traffic under each DeepSpeed configuration.

    python dehvf_ds/plan.py --config coco_llama13b --gpus-per-node 8 --nodes 2 --gpu H100-80G

Takes the flags of ``train.py`` and those of ``PlanConfig``. Needs no GPU and no weights: backbones are
counted from their configuration files, or from built-in sizes where a name is known and no directory of that
name is here: ``--model.language_model llama-7b --model.vision_tower clip-vit-l14`` works over any recipe.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig

from dehvf_ds.config import RunConfig, UserError, parse_run_config
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import run_entry
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training import planning
from dehvf_ds.training.engine import build_model_config, read_deepspeed_json
from dehvf_ds.training.metrics import PEAK_FLOPS
from dehvf_ds.training.planning import GIB, STRATEGIES, Cluster, Estimate, Shapes, Strategy, Work, Zero

GB = 1e9
DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
JSON_NAMES: dict[Strategy, str] = {
    "ZeRO-3": "zero3.json",
    "ZeRO-3 + hpZ": "zero3_hpz.json",
    "ZeRO-3 + offload": "zero3_offload.json",
    "ZeRO-2": "zero2.json",
}
FULL = 0.92
"""Share of a GPU's memory that a plan may fill; fragments of the allocator take of the rest."""

LINK_SHARE = 0.8
"""Share of a link's nominal speed that large messages are assumed to reach."""

GpuName = Literal["H100-80G", "H200-141G", "A100-80G", "A100-40G", "B200-192G", "L40S-48G", "cpu"]

# Memory in GiB as CUDA tells it (rounded), GPU to GPU and host to GPU in GB/s and direction (data sheets).
GPUS: dict[str, tuple[float | None, float, float]] = {
    "H100-80G": (79, 450, 64),
    "H200-141G": (140, 450, 64),
    "A100-80G": (79, 300, 32),
    "A100-40G": (39, 300, 32),
    "B200-192G": (178, 900, 64),
    "L40S-48G": (44, 32, 32),
    "cpu": (None, 10, 10),
}
CPU_FLOPS = 1e11

# Published shapes by the last part of a path or hub id, so that a plan needs no download, and the side of
# the pictures that a tower's processor makes.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "clip-vit-large-patch14": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    "dinov2-small": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
}
ALIASES = {"clip-vit-l14": "clip-vit-large-patch14", "dinov2-s14": "dinov2-small"}
IMAGE_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Where the run is to go, and what is assumed of it.

    Attributes:
        gpus_per_node: GPUs of a machine.
        nodes: machines.
        gpu: kind of GPU.
        mfu: assumed share of the GPU's peak that arithmetic reaches.
        tokens: text tokens of a row, padding included; None takes ``data.max_tokens``.
        nvlink_gb_s: between GPUs of a node, GB/s a GPU and direction; None takes the GPU's.
        internode_gb_s: between nodes, GB/s a GPU and direction; 50 is 400 Gb/s.
        host_gb_s: between GPU and host, GB/s a GPU and direction; None takes the GPU's.
        overhead_gib: assumed memory of CUDA's context, NCCL's buffers and libraries' work space.
    """

    gpus_per_node: int = 8
    nodes: int = 1
    gpu: GpuName = "H100-80G"
    mfu: float = 0.5
    tokens: int | None = None
    nvlink_gb_s: float | None = None
    internode_gb_s: float = 50.0
    host_gb_s: float | None = None
    overhead_gib: float = 3.0

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "nodes", "tokens", "nvlink_gb_s", "internode_gb_s", "host_gb_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive")
        if not 0 < self.mfu <= 1:
            raise UserError("--mfu must lie in (0, 1]")
        if self.overhead_gib < 0:
            raise UserError("--overhead-gib must be at least 0")

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one GPU; None for the CPU, which is not checked."""
        gibibytes = GPUS[self.gpu][0]
        return None if gibibytes is None else gibibytes * GIB

    @property
    def limit_bytes(self) -> float | None:
        """Memory of one GPU that a plan may fill."""
        return None if self.memory_bytes is None else FULL * self.memory_bytes

    @property
    def overhead_bytes(self) -> float:
        """Assumed overhead of a GPU; the CPU has none of it."""
        return 0.0 if self.memory_bytes is None else self.overhead_gib * GIB

    @property
    def cluster(self) -> Cluster:
        """The same as the formulas take it."""
        _, intra, host = GPUS[self.gpu]
        return Cluster(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            peak_flops=next((v for k, v in PEAK_FLOPS.items() if self.gpu.startswith(k)), CPU_FLOPS),
            mfu=self.mfu,
            intra_bytes_per_s=LINK_SHARE * (self.nvlink_gb_s or intra) * GB,
            inter_bytes_per_s=LINK_SHARE * self.internode_gb_s * GB,
            host_bytes_per_s=LINK_SHARE * (self.host_gb_s or host) * GB,
        )


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
    recomputed: list[Estimate]
    chosen: Estimate | None
    notes: list[str]


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code.

    Raises:
        UserError: a flag, a configuration file or a backbone that the user must mend.
    """
    own, others = split_flags(argv)
    place = parse_plan_config(own)
    print_plan(build_plan(parse_run_config(others), place))
    return 0


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the flags of ``PlanConfig``, written with dashes or underscores, from the run's."""
    names = {field.name for field in fields(PlanConfig)}
    own, others = [], []
    rest = iter(argv)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if arg in ("-h", "--help"):
            own.append(arg)
        elif not flag.startswith("--") or name not in names:
            others.append(arg)
        elif equals:
            own.append(f"--{name}={value}")
        else:
            own += [f"--{name}", *[value for value in [next(rest, None)] if value is not None]]
    return own, others


def parse_plan_config(args: Sequence[str]) -> PlanConfig:
    """Parses the plan's own flags.

    Raises:
        UserError: a value of the wrong type or outside its range.
    """
    description = (__doc__ or "").splitlines()[0] + " Every flag of train.py is taken too."
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(PlanConfig)
    try:
        namespace = parser.instantiate(parser.parse_args(list(args)))
    except (ArgumentError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from None
    return PlanConfig(**{field.name: namespace[field.name] for field in fields(PlanConfig)})


def build_plan(config: RunConfig, place: PlanConfig) -> Plan:
    """Computes the plan of a run.

    Raises:
        UserError: a backbone is neither to be read nor known, or a size does not fit.
    """
    notes: list[str] = []
    cluster = place.cluster
    config = _divisible(config, cluster.world, notes)
    zeros, size = _read_zero(config, place, notes)
    model = _build_on_meta(config, notes)
    shapes = planning.count_shapes(model, zeros["ZeRO-3"].persistence_threshold)
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
            planning.estimate(
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
        recomputed=recomputed,
        chosen=planning.choose([*estimates, *recomputed], place.limit_bytes),
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

    The run's own JSON speaks for its configuration, the shipped ones for the others; where none is shipped,
    DeepSpeed's defaults.
    """
    path = Path(config.deepspeed)
    if not path.is_file() and config.deepspeed == f"ds_configs/{path.name}":
        path = DS_CONFIGS / path.name  # started from another directory
    given = read_deepspeed_json(str(path), config, place.cluster.world)
    bf16 = json.loads(path.read_text(encoding="utf-8")).get("bf16", {}).get("enabled", False)
    on_gpu = place.memory_bytes is not None
    size = 2 if bf16 is True or (bf16 == "auto" and on_gpu) else 4
    if size == 4 and on_gpu:
        notes.append(f"{config.deepspeed} computes in fp32, but the times are at the GPU's bf16 peak")
    zeros: dict[Strategy, Zero] = {}
    for strategy, name in JSON_NAMES.items():
        shipped = DS_CONFIGS / name
        content = json.loads(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
        zeros[strategy] = Zero.from_json(content)
    zeros[_strategy_of(given)] = Zero.from_json(given)
    return zeros, size


def _strategy_of(ds_config: dict[str, Any]) -> Strategy:
    """The configuration that a DeepSpeed JSON describes; stages below 3 count as ZeRO-2."""
    zero = ds_config["zero_optimization"]
    if zero.get("stage", 0) < 3:
        return "ZeRO-2"
    if "offload_param" in zero:
        return "ZeRO-3 + offload"
    return "ZeRO-3 + hpZ" if zero.get("zero_hpz_partition_size", 1) > 1 else "ZeRO-3"


def _build_on_meta(config: RunConfig, notes: list[str]) -> DehvfForConditionalGeneration:
    """The run's model without weights."""
    settings = config.model
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for part in ("language_model", "vision_tower"):
            source = getattr(settings, part)
            known = _known_shape(source)
            if known is not None:
                paths[part] = str(Path(directory) / part)
                known.save_pretrained(paths[part])
                notes.append(f"model.{part} {source} is no directory here: built-in sizes")
        if "vision_tower" in paths:
            image_size = settings.image_size or IMAGE_SIZE
        else:
            image_size = build_image_transform(settings.vision_tower, settings.image_size).image_size
        built = build_model_config(replace(settings, **paths), image_size=image_size)
        with torch.device("meta"):
            return DehvfForConditionalGeneration(built)


def _known_shape(source: str) -> PreTrainedConfig | None:
    """Built-in sizes for a name that is no directory here."""
    name = Path(source).name.lower()
    return None if Path(source).is_dir() else SHAPES.get(ALIASES.get(name, name))


# --- printing ---


def print_plan(plan: Plan) -> None:
    """Prints the plan: tables on a terminal, aligned lines elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    for title, rows in (
        (_memory_title(plan), _memory_rows(plan)),
        ("Time and traffic of one optimizer step", _time_rows(plan)),
    ):
        if title.startswith("Memory"):
            console.print("\n".join(_head_lines(plan)), markup=False)
        _print_table(console, title, rows)
    console.print("\n".join(_foot_lines(plan)), markup=False)


def _print_table(console: Console, title: str, rows: list[list[str]]) -> None:
    header = ["", *STRATEGIES]
    console.print(f"\n{title}", markup=False)
    if console.is_terminal:
        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        console.print("  ".join(cells).rstrip(), markup=False)


def _head_lines(plan: Plan) -> list[str]:
    shapes, work, place = plan.shapes, plan.work, plan.place
    trainable = f"{shapes.trainable:,} ({shapes.lora:,} in LoRA)"
    return [
        f"{plan.config.run_dir}: {place.nodes} x {place.gpus_per_node} {place.gpu}, fusion {shapes.fusion}",
        f"parameters: LLM {shapes.language / 1e9:.3f} B, tower {shapes.tower / 1e9:.3f} B frozen; "
        f"trainable {trainable}",
        f"step: {plan.config.train.global_batch_size} rows = {place.cluster.world} GPUs x {work.rows} rows x "
        f"{plan.accumulation} micro-steps; {work.tokens} tokens a row, {shapes.slots} visual tokens a level, "
        f"{'bf16' if work.element_bytes == 2 else 'fp32'}",
        *(f"note: {note}" for note in plan.notes),
    ]


def _memory_title(plan: Plan) -> str:
    recompute = "on" if plan.work.checkpointing else "off"
    return f"Memory of one GPU in GiB (activation checkpointing {recompute})"


def _memory_rows(plan: Plan) -> list[list[str]]:
    def row(name: str, value: Callable[[Estimate], float], of: list[Estimate] | None = None) -> list[str]:
        return [name, *(f"{value(e) / GIB:.2f}" for e in of or plan.estimates)]

    rows = [
        row("frozen LLM", lambda e: e.language_bytes),
        row("frozen tower", lambda e: e.tower_bytes),
        row("trainable, compute dtype", lambda e: e.trainable_bytes),
        row("fp32 masters, Adam moments", lambda e: e.optimizer_bytes),
        row("gradients", lambda e: e.gradient_bytes),
        row("gathered parameters", lambda e: e.live_bytes),
        row("gradient buckets", lambda e: e.bucket_bytes),
        row("activations", lambda e: e.activation_bytes),
        row("  of these for pictures", lambda e: e.visual_bytes),
        row("CUDA, NCCL (assumed)", lambda e: e.overhead_bytes),
        row("total", lambda e: e.total_bytes),
    ]
    if not plan.work.checkpointing:
        rows += [
            row("activations, checkpointing", lambda e: e.activation_bytes, plan.recomputed),
            row("total, checkpointing", lambda e: e.total_bytes, plan.recomputed),
        ]
    memory = plan.place.memory_bytes
    if memory is not None:
        rows.append(
            [f"share of {memory / GIB:.0f} GiB", *(f"{e.total_bytes / memory:.0%}" for e in plan.estimates)]
        )
    rows += [
        row("host of a node, loading", lambda e: e.host_load_bytes),
        row("host of a node, pinned", lambda e: e.host_run_bytes),
    ]
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
    shapes, work, place = plan.shapes, plan.work, plan.place
    parts = {
        "tower forward": planning.tower_flops(shapes, work),
        "LLM": planning.language_flops(shapes, work),
        "visual branch": planning.branch_flops(shapes, work),
    }
    times = place.cluster.world * plan.accumulation
    flops = ", ".join(f"{name} {value * times / 1e12:.1f}" for name, value in parts.items())
    cluster = place.cluster
    share = parts["visual branch"] / sum(parts.values())
    return [
        "",
        f"TFLOP of a step, all GPUs: {flops} (visual branch {share:.1%})",
        f"checkpoint: {planning.checkpoint_bytes(shapes) / 1e6:.0f} MB (fp32 masters, two moments, adapter)",
        f"recommended: {_reason(plan)}",
        "",
        "Computed from shapes: parameters, states, buckets of the JSONs, activations (what autograd keeps;",
        "  benchmarks/memory.py holds them against a measured peak), FLOPs, traffic.",
        f"Assumed: MFU {place.mfu:g} of {cluster.peak_flops / 1e12:g} TFLOP/s; {_speeds(place)};",
        f"  rings over all links at {LINK_SHARE:.0%} of their speed, gathers overlapping with arithmetic;",
        f"  {place.overhead_bytes / GIB:g} GiB for CUDA, NCCL and work space; at most {FULL:.0%} of a GPU "
        "filled;",
        f"  every row {work.tokens} tokens long, padded, every token supervised (upper bounds: training pads "
        "to the",
        "  longest row of a batch); SDPA attention without a stored score matrix; under ZeRO-2 each",
        "  rank's copy of the weights in host memory at once; the loader's host memory not counted.",
    ]


def _speeds(place: PlanConfig) -> str:
    _, intra, host = GPUS[place.gpu]
    return (
        f"GB/s a GPU and way {place.nvlink_gb_s or intra:g} within a node, {place.internode_gb_s:g} between "
        f"nodes, {place.host_gb_s or host:g} to the host"
    )


def _reason(plan: Plan) -> str:
    chosen, limit = plan.chosen, plan.place.limit_bytes
    if chosen is None:
        least = min(plan.recomputed, key=lambda e: e.total_bytes)
        return (
            f"nothing fits; the least is {least.strategy} with activation checkpointing, "
            f"{least.total_bytes / GIB:.1f} GiB. Use a smaller train.micro_batch_size, more or larger GPUs"
        )
    name = chosen.strategy
    if chosen.checkpointing and not plan.work.checkpointing:
        name += " with --train.activation_checkpointing true"
    gathering = plan.estimates[0]
    if chosen.strategy == "ZeRO-2":
        reason = "it gathers nothing, and one GPU holds the frozen weights"
        if gathering.gather_s > gathering.arithmetic_s:
            reason += (
                f"; ZeRO-3's gathers ({gathering.gather_s:.3f} s against {gathering.arithmetic_s:.3f} s of "
                f"arithmetic) hide only from {gathering.hiding_rows} rows a micro-step"
            )
        elif gathering.gather_s > 0:
            saved = (chosen.total_bytes - gathering.total_bytes) / GIB
            reason += f"; ZeRO-3 is as fast if the links are, and takes {saved:.0f} GiB less"
    elif chosen.gather_s <= chosen.arithmetic_s:
        reason = "it fits, and its gathers hide behind arithmetic"
    else:
        reason = f"the fastest that fits; its gathers hide from {chosen.hiding_rows} rows a micro-step"
    if limit is not None:
        reason += f"; {(limit - chosen.total_bytes) / GIB:.0f} GiB to spare"
    if chosen.strategy == "ZeRO-3 + hpZ":
        reason += f"; set zero_hpz_partition_size to {plan.place.gpus_per_node}, see ds_configs/README.md"
    if chosen.host_load_bytes > 64 * GB:
        reason += f"; loading takes {chosen.host_load_bytes / GB:.0f} GB of host memory a node"
    return f"{name} ({JSON_NAMES[chosen.strategy]}): {reason}"


if __name__ == "__main__":
    run_entry(main)
