"""Trains one arm once on one thread, and measures it on pictures that were never shown.

    python benchmarks/method/one_run.py --task scenes --arm ffn --lr 3e-3 --seed 1 --split test --output FILE

Steps as the demo's recipe has them: AdamW with fp32 masters beside bf16 weights, linear warm-up and a cosine.
Writes one JSON object. With `--unscored`, for machines without Java, answers are kept; `report.py --gather`
scores them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from arms import Arm, build, read_arm, share_of, trained
from tasks import TASKS, Found, Split
from torch import Tensor
from tower import PlayedTower

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import TrainConfig
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.engine import learning_rate, parameter_groups


def main() -> None:
    """Parses the flags, trains, measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--unscored", action="store_true")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as path:
        path.write_text(json.dumps(vars(args) | found, default=str) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> Found:
    """Trains with one seed, which decides the start and the order of rows; only test rows are answered."""
    task, arm = TASKS[args.task], read_arm(args.arm)
    model = build(arm, args.seed)
    tower = None
    if arm.model["fusion"] != "none":
        tower = PlayedTower(model.config)
        model.vision_tower = tower
    model.to(args.device)
    learns = trained(model, arm)
    rows = {"global_batch_size": args.rows, "micro_batch_size": args.rows}
    config = TrainConfig(steps=args.steps, lr=args.lr, **rows | arm.train)
    found = train(model, tower, arm, Split(task, "train", args.seed, args.device), config, args.seed)
    split = Split(task, args.split, args.seed, args.device)
    found |= measure(model, tower, split)
    if args.split == "test":
        found["answers"] = task.answer(model, tower, split)
        if not args.unscored:
            found |= task.score(split, found["answers"])
    return found | {"trained": sum(p.numel() for p in learns.values())}


def train(
    model: DehvfForConditionalGeneration,
    tower: PlayedTower | None,
    arm: Arm,
    split: Split,
    config: TrainConfig,
    seed: int,
) -> Found:
    """Takes the steps; returns losses and what a step cost."""
    assert config.steps is not None
    named = trained(model.train(), arm)
    masters = {name: torch.nn.Parameter(p.data.float()) for name, p in named.items()}
    groups = []
    for share in {share_of(name, arm) for name in masters}:
        part = {name: p for name, p in masters.items() if share_of(name, arm) == share}
        groups += [group | {"share": share} for group in parameter_groups(part, config.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    drawn, rows = split.training_rows(seed), config.global_batch_size
    losses, cpu_seconds, seconds, tokens = [], [], [], 0
    for step in range(config.steps):
        started, started_at = time.process_time(), time.perf_counter()
        first = step * rows % (len(drawn) - rows + 1)
        batch = split.batch(tower, drawn[first : first + rows])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, config.steps) * group["share"]
        model.zero_grad()
        output = model(**batch.training_inputs())
        output.loss.backward()
        for name, parameter in named.items():
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), config.max_grad_norm)
        optimizer.step()
        for name, parameter in named.items():
            parameter.data.copy_(masters[name].data)
        losses.append(output.loss.item())
        tokens += batch.count().num_supervised
        cpu_seconds.append(time.process_time() - started)
        seconds.append(time.perf_counter() - started_at)
    return {
        "train_loss": statistics.mean(losses[-20:]),
        "supervised_tokens": tokens,
        "step_cpu_s": statistics.median(cpu_seconds),
        "step_s": statistics.median(seconds),
        "losses": [round(loss, 4) for loss in losses[::10]],
    }


@torch.no_grad()
def measure(model: DehvfForConditionalGeneration, tower: PlayedTower | None, split: Split) -> Found:
    """Loss a token, over two captions of a picture or a conversation, and the fuser's weights."""
    model.eval()
    loss = tokens = 0.0
    weights: list[Tensor] = []
    for rows in split.parts():
        for text in (0, 2)[: split.task.texts]:
            batch = split.batch(tower, [(row, text) for row in rows])
            output = model(**batch.training_inputs())
            loss += output.loss_sum.item()
            tokens += output.num_supervised.item()
            if output.router_weights is not None:
                weights.append(output.router_weights.float())
    found: Found = {"loss": loss / tokens}
    if weights:
        every = torch.cat(weights)
        found["weights"] = every.mean(dim=0).tolist()
        found["weights_std"] = every.std(dim=0).mean().item()
    return found


if __name__ == "__main__":
    main()
