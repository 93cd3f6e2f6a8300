"""What summing bf16 gradients over ranks costs in bf16 and in fp32: error against an exact sum.

    python benchmarks/gradient_sums.py --run runs/demo --ranks 8 64

Gradients are real ones, of a run's weights on micro-batches of its own data, one a rank, computed in fp32 and
rounded to bf16 as a bf16 backward hands them over. They are summed in the order of a ring, each part sum
rounded to the dtype that travels. Prints a JSON line a number of ranks: relative error of the mean gradient
by norm, and the share of its elements that are off by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dehvf_ds.config import parse_run_config
from dehvf_ds.distributed import read_world
from dehvf_ds.model.adapter import load_adapter
from dehvf_ds.model.backbones import load_model
from dehvf_ds.training.run import resolve

ROWS = 8
"""Of a rank's micro-batch."""


def main() -> None:
    """Computes the gradients once, and sums the first of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run directory that has ended")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="how many gradients are summed")
    flags = parser.parse_args()
    gradients = list(compute(flags.run, max(flags.ranks)))
    for ranks in flags.ranks:
        exact = torch.stack([g.double() for g in gradients[:ranks]]).mean(dim=0)
        line: dict[str, float] = {"ranks": ranks}
        for dtype in (torch.bfloat16, torch.float32):
            off = ring_mean(gradients[:ranks], dtype).double() - exact
            name = str(dtype).removeprefix("torch.")
            line[f"{name} error"] = float(off.norm() / exact.norm())
            line[f"{name} off by a tenth"] = float((off.abs() > 0.1 * exact.abs()).double().mean())
        print(json.dumps(line), flush=True)


def compute(run: Path, count: int):
    """Yields one flat bf16 gradient a rank."""
    sizes = {"global": ROWS * count, "micro": ROWS}
    flags = [word for name, size in sizes.items() for word in (f"--train.{name}_batch_size", str(size))]
    config = parse_run_config(["--config", str(run / "config.yaml"), *flags])
    looked_at = resolve(config, read_world())
    model = load_model(
        looked_at.model_config,
        config.model.language_model,
        config.model.vision_tower,
        dtype=torch.float32,
    )
    load_adapter(model, run / "adapter")
    trainable = list(model.train().trainable_parameters().values())
    for batch in looked_at.training_batches(0, 1):
        output = model(**batch.to("cpu", torch.float32).inputs())
        model.zero_grad()
        (output.loss_sum / batch.num_supervised()).backward()
        yield torch.cat([p.grad.flatten() for p in trainable if p.grad is not None]).bfloat16()


def ring_mean(gradients: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The mean of gradients whose part sums travel in ``dtype``."""
    total = gradients[0].to(dtype)
    for gradient in gradients[1:]:
        total = total + gradient.to(dtype)
    return total / len(gradients)


if __name__ == "__main__":
    main()
