"""Writes benchmarks/scaling.md: step time, traffic, efficiency from 1 to 1,024 GPUs; computed, not measured.

    python benchmarks/scaling.py > benchmarks/scaling.md

The formulas are those of plan.py, with one addition: the latency of a ring's hops, which bandwidth alone
leaves out and which grows with the number of GPUs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.config import parse_run_config
from dehvf_ds.planning.estimate import LINK_SHARE, Estimate, PlanConfig
from dehvf_ds.planning.memory import JSON_NAMES, Strategy
from dehvf_ds.planning.plan import Plan, build_plan

RECIPE = "coco_llama13b"
ROWS = 16
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE = 8
SHOWN: tuple[Strategy, ...] = ("ZeRO-3", "ZeRO-3 + hpZ", "ZeRO-2")

HOP_S = {"within a node": 1.5e-6, "between nodes": 5e-6}
"""Assumed latency of one hop of a ring."""


@dataclass(frozen=True)
class Point:
    """One size of the job.

    Attributes:
        gpus: GPUs.
        estimate: plan.py's.
        latency_s: of the hops of all rings of a step.
    """

    gpus: int
    estimate: Estimate
    latency_s: float

    @property
    def step_s(self) -> float:
        """Time of a step: arithmetic hides gathers and their latency, not the trainables' traffic."""
        gathers_s = self.estimate.gather_s + self.latency_s
        return max(self.estimate.arithmetic_s, gathers_s) + self.estimate.gradient_traffic_s

    @property
    def efficiency(self) -> float:
        """Share of the step that is arithmetic."""
        return self.estimate.arithmetic_s / self.step_s


@cache
def plan_for(gpus: int, internode_gb_s: float) -> Plan:
    """The plan of so many GPUs with ``ROWS`` rows each and one micro-step."""
    rows = ("--train.micro_batch_size", str(ROWS), "--train.global_batch_size", str(ROWS * gpus))
    place = PlanConfig(
        nodes=max(1, gpus // GPUS_PER_NODE),
        gpus_per_node=min(gpus, GPUS_PER_NODE),
        internode_gb_s=internode_gb_s,
    )
    return build_plan(parse_run_config(["--config", RECIPE, *rows]), place)


def latency_s(plan: Plan, strategy: Strategy) -> float:
    """Latency of a step's gathers: one a decoder layer and direction, each around a ring of who gathers."""
    within = strategy == "ZeRO-3 + hpZ" and plan.place.gpus_per_node > 1
    ranks = plan.place.gpus_per_node if within else plan.place.world
    if strategy == "ZeRO-2" or ranks == 1:
        return 0.0
    nodes = max(1, ranks // plan.place.gpus_per_node)
    between = nodes if nodes > 1 else 0
    hops = (ranks - 1 - between) * HOP_S["within a node"] + between * HOP_S["between nodes"]
    return 2 * plan.model_config.num_layers * hops


def points(strategy: Strategy, internode_gb_s: float) -> list[Point]:
    """All sizes under one configuration."""
    number = list(JSON_NAMES).index(strategy)
    plans = {gpus: plan_for(gpus, internode_gb_s) for gpus in SIZES}
    return [Point(gpus, plan.estimates[number], latency_s(plan, strategy)) for gpus, plan in plans.items()]


def table(strategy: Strategy, internode_gb_s: float) -> list[str]:
    """One configuration's rows, in Markdown."""
    lines = [
        "| GPUs | arithmetic, s | received, GB | gathers, s | hops, s | step, s | rows/s | efficiency |",
        "|---" * 8 + "|",
    ]
    for point in points(strategy, internode_gb_s):
        found = point.estimate
        lines.append(
            f"| {point.gpus:,} | {found.arithmetic_s:.3f} | {found.gather_bytes / 1e9:.1f} | "
            f"{found.gather_s:.3f} | {point.latency_s:.3f} | {point.step_s:.3f} | "
            f"{point.gpus * ROWS / point.step_s:,.0f} | {point.efficiency:.0%} |"
        )
    return lines


def main() -> None:
    """Prints the page."""
    defaults = PlanConfig()
    nvlink = defaults.links_gb_s[0]
    print(f"""# Scaling on paper

Computed by `python benchmarks/scaling.py > benchmarks/scaling.md` from the formulas of `plan.py`.
**Nothing here was measured.** `{RECIPE}`, {ROWS} rows a GPU and one micro-step at every size (the
global batch grows with the job), nodes of {GPUS_PER_NODE} {defaults.gpu}, arithmetic at MFU
{defaults.mfu}. NVLink {nvlink:g} GB/s a GPU and direction; between nodes as the headings say;
{LINK_SHARE:.0%} of both reached. A hop of a ring takes {HOP_S["within a node"] * 1e6:g} us within a
node and {HOP_S["between nodes"] * 1e6:g} us between nodes (assumed), and a step makes one gather a
decoder layer and direction. Efficiency is arithmetic over step.
""")
    for internode_gb_s in (50.0, 12.5):
        for strategy in SHOWN:
            told = f"{internode_gb_s * 8:g} Gb/s a GPU between nodes"
            print(f"## {strategy}, {told}\n")
            print("\n".join(table(strategy, internode_gb_s)) + "\n")
    print("""## What it says

- **ZeRO-2 wherever the frozen weights fit on one GPU**: only the trainables' gradients travel, 18
  MB a GPU and step, and the size of the job does not matter to it. Frozen weights have no optimizer
  state to shard.
- **hpZ where they do not**: a step takes as long on 1,024 GPUs as on 8, since nothing frozen
  crosses a node's edge.
- **ZeRO-3 over all nodes** costs bandwidth from the second node on (at 100 Gb/s a GPU four fifths
  of the step) and latency beyond some 128 GPUs: 80 gathers a step go round a ring of that many
  hops. NCCL's logarithmic all-gather (PAT) exists for one GPU a node alone; with eight it is a
  ring.
- What is not in it: stragglers, the loader (0.11 s a step for 16 rows are 140 pictures a second and
  GPU, about a core's decoding), start-up, checkpoints (73 MB), congestion, rings of ZeRO-2's and
  hpZ's small collectives.""")


if __name__ == "__main__":
    main()
