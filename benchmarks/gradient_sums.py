"""What summing bf16 gradients over ranks costs in bf16 and in fp32: error against an exact sum.

    python benchmarks/gradient_sums.py --run runs/demo --ranks 8 64

Gradients are real ones, of a run's weights on micro-batches of its own data, one a rank, computed in fp32 and
rounded to bf16 as a bf16 backward hands them over. They are summed in the order of a ring, each part sum
rounded to the dtype that travels. Prints a JSON line a number of ranks: relative error of the mean gradient
by norm, and the share of its elements that are off by more than a tenth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bench import flags
from torch import Tensor

from dehvf_ds.config import parse_run_config
from dehvf_ds.distributed import read_world
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.training.resolve import resolve

ROWS = 8
"""Of a rank's micro-batch."""


def main() -> None:
    """Computes the gradients once, and sums the first of them."""
    parser = flags(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run directory that has ended")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="how many gradients are summed")
    args = parser.parse_args()
    gradients = list(compute(args.run, max(args.ranks)))
    for ranks in args.ranks:
        exact = torch.stack([g.double() for g in gradients[:ranks]]).mean(dim=0)
        line: dict[str, float] = {"ranks": ranks}
        for dtype in (torch.bfloat16, torch.float32):
            total = gradients[0].to(dtype)
            for gradient in gradients[1:ranks]:
                total = total + gradient.to(dtype)
            off = (total / ranks).double() - exact
            name = str(dtype).removeprefix("torch.")
            line[f"{name} error"] = float(off.norm() / exact.norm())
            line[f"{name} off by a tenth"] = float((off.abs() > 0.1 * exact.abs()).double().mean())
        print(json.dumps(line), flush=True)


def compute(run: Path, count: int) -> Iterator[Tensor]:
    """Yields one flat bf16 gradient a rank."""
    sizes = [f"--train.global_batch_size={ROWS * count}", f"--train.micro_batch_size={ROWS}"]
    resolved = resolve(parse_run_config(["--config", str(run / "config.yaml"), *sizes]), read_world())
    model = find_trained(run).load("fp32").train()
    trainable = model.trainable_parameters()
    for batch in resolved.training_batches(0, 1):
        model.zero_grad()
        output = model(**batch.to(torch.device("cpu"), torch.float32).inputs())
        (output.loss_sum / batch.num_supervised()).backward()
        yield torch.cat([p.grad.flatten() for p in trainable.values() if p.grad is not None]).bfloat16()


if __name__ == "__main__":
    main()
