"""The plan as text: tables on a terminal, aligned lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from dehvf_ds.training.planning.estimate import Estimate
from dehvf_ds.training.planning.flops import branch_flops, language_flops, tower_flops
from dehvf_ds.training.planning.memory import GIB, checkpoint_bytes
from dehvf_ds.training.planning.place import FULL, GB, GPUS, LINK_SHARE, PlanConfig
from dehvf_ds.training.planning.plan import JSON_NAMES, Plan
from dehvf_ds.training.planning.zero import STRATEGIES


def print_plan(plan: Plan) -> None:
    """Prints the plan: tables on a terminal, aligned lines elsewhere."""
    console = Console(highlight=False, soft_wrap=True)
    console.print("\n".join(_head_lines(plan)), markup=False)
    _print_table(console, _memory_title(plan), _memory_rows(plan))
    _print_table(console, "Time and traffic of one optimizer step", _time_rows(plan))
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
    if plan.inside:
        rows += [
            ["whole copy to evaluate inside", *(f"{found.copy / GIB:.2f}" for found in plan.inside)],
            ["total while it evaluates", *(f"{found.total / GIB:.2f}" for found in plan.inside)],
        ]
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
        "tower forward": tower_flops(shapes, work),
        "LLM": language_flops(shapes, work),
        "visual branch": branch_flops(shapes, work),
    }
    times = place.cluster.world * plan.accumulation
    flops = ", ".join(f"{name} {value * times / 1e12:.1f}" for name, value in parts.items())
    cluster = place.cluster
    share = parts["visual branch"] / sum(parts.values())
    return [
        "",
        f"TFLOP of a step, all GPUs: {flops} (visual branch {share:.1%})",
        f"checkpoint: {checkpoint_bytes(shapes) / 1e6:.0f} MB (fp32 masters, two moments, adapter)",
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
    if chosen.host_load_bytes > 64 * GB:
        reason += f"; loading takes {chosen.host_load_bytes / GB:.0f} GB of host memory a node"
    return f"{name} ({JSON_NAMES[chosen.strategy]}): {reason}"
