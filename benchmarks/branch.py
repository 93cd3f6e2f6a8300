"""What the visual branch costs a training step, against its materialised form, and how the cost grows.

    python benchmarks/branch.py share [--layers 2] [--rows 4] [--tokens 24]   # layers of LLaMA-13B's shape
    python benchmarks/branch.py form                                          # rank space against [slots, d]
    python benchmarks/branch.py growth                                        # with T, M, J, rows and depth

Forward and backward of plain torch, random weights, features of the tower given; on the GPU if there is one.
Saved bytes are those kept for the backward, without parameters and inputs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from bench import (
    DTYPES,
    LORA,
    MIB,
    flags,
    median_and_range,
    print_profile,
    saved_bytes,
    seconds_in_turn,
)
from decode import random_model
from torch import Tensor, nn
from transformers import LlamaConfig

from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.features import HierarchicalFuser, Projector
from dehvf_ds.model.ffn import MemoryReader, VisualFFN, decoder_layers
from dehvf_ds.planning.plan import BACKBONES

DIM, SLOTS, RANK, FEATURE_LAYERS, VISION_DIM = 5120, 257, 128, 6, 1024
GROWTH = {
    "tokens": (32, 128, 512, 2048),
    "slots": (50, 257, 577, 1025),
    "rows": (1, 2, 4, 8),
    "depth": (1, 2, 4, 8),
    "feature layers": (1, 6, 12, 24),
}
FORMS = [(rank, tokens) for rank in (96, 128) for tokens in (24, 128, 512)]


def main() -> None:
    """Parses the flags and measures what is named."""
    parser = flags(__doc__)
    parser.add_argument("what", choices=("share", "form", "growth"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--profile", action="store_true", help="print where the branch spends its time")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(DTYPES[args.dtype])
    {"share": share, "form": form, "growth": growth}[args.what](args)


class Branch(nn.Module):
    """Projector, fuser, and the reads of a decoder's layers, without the decoder."""

    def __init__(
        self, depth: int, slots: int = SLOTS, rank: int = RANK, feature_layers: int = FEATURE_LAYERS
    ) -> None:
        super().__init__()
        self.projector = Projector(VISION_DIM, rank)
        self.fuser = HierarchicalFuser(depth, feature_layers, VISION_DIM, 32, "layer")
        self.reader = MemoryReader(DIM, slots, rank)
        self.reader.w_out.data.normal_(std=0.02)
        self.layers = nn.ModuleList(VisualFFN(nn.Identity(), self.reader, slots, rank) for _ in range(depth))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Every layer reads the same ``x``, a row a picture; their results are summed."""
        present = torch.ones(len(x), dtype=torch.bool)
        memory, _ = self.fuser(features[:, :, 0], self.projector(features), present)
        total = torch.zeros_like(x)
        for layer, one in zip(self.layers, memory.unbind(dim=1), strict=True):
            total = total + self.reader(x, one, layer.scale_in, layer.scale_out)
        return total


def trained(run: Callable[[], Tensor]) -> Callable[[], None]:
    """A forward and a backward."""
    return lambda: run().sum().backward()


def branch_step(
    rows: int, tokens: int, depth: int, slots: int = SLOTS, feature_layers: int = FEATURE_LAYERS
) -> Callable[[], None]:
    """A forward and backward of the branch alone."""
    branch = Branch(depth, slots, feature_layers=feature_layers)
    x = torch.randn(rows, tokens, DIM, requires_grad=True)
    features = torch.randn(rows, feature_layers, slots, VISION_DIM)
    return trained(lambda: branch(x, features))


def share(args: argparse.Namespace) -> None:
    """Layers with the branch and without in turn, and the whole decoder's branch beside its layers.

    Projector and fuser run once a picture, however many layers there are: a few layers alone would show them
    too large. So the second figure scales the layers' time to the decoder's depth.
    """
    depth = BACKBONES["llama-13b"].num_hidden_layers
    text = BACKBONES["llama-13b"].to_dict() | {"num_hidden_layers": args.layers, "vocab_size": 1000}
    config = DehvfConfig(
        text_config=LlamaConfig(**text),
        vision_config=BACKBONES["clip-vit-large-patch14"],
        rank=RANK,
        num_feature_layers=FEATURE_LAYERS,
        lora=LORA,
    )
    model = random_model(config, torch.get_default_dtype(), torch.get_default_device(), tower=False)
    layers = decoder_layers(model.language_model)
    wrapped = [layer.mlp for layer in layers]
    ids = torch.randint(5, 900, (args.rows, args.tokens))
    features = torch.randn(args.rows, FEATURE_LAYERS, SLOTS, VISION_DIM)
    present = torch.ones(args.rows, dtype=torch.bool)

    def step(with_branch: bool) -> None:
        model.zero_grad()
        for layer, ffn in zip(layers, wrapped, strict=True):
            layer.mlp = ffn if with_branch else ffn.ffn
        forward, given = model.language_model, {}
        if with_branch:
            memory, _ = model.fuser(features[:, :, 0], model.projector(features), present)
            forward, given = model, {"visual_memory": memory}
        forward(input_ids=ids, labels=ids, **given).loss.backward()

    whole = branch_step(args.rows, args.tokens, depth)
    if args.profile:
        print_profile(whole)
    name = f"branch of {depth} layers"
    runs = {"with": lambda: step(True), "without": lambda: step(False), name: whole}
    rounds = list(seconds_in_turn(runs, args.pairs))
    for seconds in rounds:
        print("   ".join(f"{run} {value:.3f} s" for run, value in seconds.items()), flush=True)
    less = [1 - seconds["without"] / seconds["with"] for seconds in rounds]
    own = [1 / (1 + seconds["without"] * depth / args.layers / seconds[name]) for seconds in rounds]
    print(f"share of {args.layers} layers' step, by difference: {median_and_range(less)}")
    print(f"share of {depth} layers' step: {median_and_range(own)}")


def materialised(
    reader: MemoryReader, x: Tensor, memory: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor:
    """The same read with [slots, dim] keys and values."""
    size = (x @ reader.w_query).square().mean(dim=-1, keepdim=True).add(1e-8).sqrt()
    keys = memory + reader.key_positions
    keys = ((keys - keys.mean(dim=1, keepdim=True)) * scale_in) @ reader.w_query.T
    values = ((memory + reader.value_positions) * scale_out) @ reader.w_out
    return F.silu(x @ keys.transpose(1, 2) / size * memory.shape[-1] ** -0.5) @ values


def form(args: argparse.Namespace) -> None:
    """One layer's read in rank space against the materialised one: time and saved bytes."""
    print("| r | T | time, of materialised | saved MiB | materialised MiB | ratio |\n" + "|---" * 6 + "|")
    for rank, tokens in FORMS:
        reader = MemoryReader(DIM, SLOTS, rank)
        reader.w_out.data.normal_(std=0.02)
        given = [
            torch.randn(args.rows, tokens, DIM, requires_grad=True),
            torch.randn(args.rows, SLOTS, rank, requires_grad=True),
            torch.ones(rank, requires_grad=True),
            torch.ones(rank, requires_grad=True),
        ]
        reads = {"rank": lambda: reader(*given), "materialised": lambda: materialised(reader, *given)}  # noqa: B023
        torch.testing.assert_close(*(read() for read in reads.values()), rtol=1e-3, atol=1e-3)
        saved = [saved_bytes(read, [*reader.parameters(), *given]) / MIB for read in reads.values()]
        rounds = seconds_in_turn({name: trained(read) for name, read in reads.items()}, args.pairs)
        ratios = [seconds["rank"] / seconds["materialised"] for seconds in rounds]
        told = f"{median_and_range(ratios)} | {saved[0]:.2f} | {saved[1]:.2f} | 1/{saved[1] / saved[0]:.1f}"
        print(f"| {rank} | {tokens} | {told} |", flush=True)


def growth(args: argparse.Namespace) -> None:
    """Seconds of the branch alone over each size, with the line and the exponent that fit them."""
    print("| size | seconds at each | line | exponent |\n|---|---|---|---|")
    for size, numbers in GROWTH.items():
        base = {"rows": 2, "tokens": 128, "depth": 2, "slots": SLOTS, "feature layers": FEATURE_LAYERS}
        steps = {}
        for number in numbers:
            rows, tokens, depth, slots, feature_layers = (base | {size: number}).values()
            steps[str(number)] = branch_step(rows, tokens, depth, slots, feature_layers)
        rounds = list(seconds_in_turn(steps, args.pairs))
        medians = [statistics.median(found[name] for found in rounds) for name in steps]
        slope, start = np.polyfit(numbers, medians, 1)
        exponent = np.polyfit(np.log(numbers), np.log(medians), 1)[0]
        told = ", ".join(f"{n}: {s:.4f}" for n, s in zip(numbers, medians, strict=True))
        print(f"| {size} | {told} | {start:.4f} + {slope:.6f} n | {exponent:.2f} |", flush=True)


if __name__ == "__main__":
    main()
