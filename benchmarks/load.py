"""Time and memory of a start: each rank reads its share of layers of 13B shape, against reading the files.

    torchrun --nproc-per-node 4 benchmarks/load.py --layers 20
    torchrun --nproc-per-node 4 benchmarks/load.py --layers 4 --transformers     # and the way of transformers

The weights are synthetic, bf16, in files of LLaMA-13B's sizes (0.63 GB a layer), in a directory that is kept.
"read" is one process that reads the files from beginning to end into one small buffer. Each load starts with
the files out of the page cache (``--warm``: in it). Memory includes the pages of files that are mapped.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import PeakMemory, flags, median_and_range
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from dehvf_ds.distributed import World, gather_to_main, init_process_group, on_main, read_world, run_entry
from dehvf_ds.model.backbones import load_backbone
from dehvf_ds.training.zero import Zero3Partitions

FILE_BYTES = 5 * 10**9
DTYPE = torch.bfloat16


def write_checkpoint(directory: Path, layers: int) -> None:
    """Writes the weights file by file, from one block of random values again and again."""
    config = LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        dtype=DTYPE,
    )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    with torch.device("meta"), no_init_weights():
        shapes = {n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    block = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).to(DTYPE)
    data = block.view(torch.uint8).numpy().tobytes()
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * shape.numel()
    places = {}
    for number, names in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * shapes[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
            places[name] = file_name
        text = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            while end:
                end -= file.write(data[:end])
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def forget(directory: Path) -> None:
    """Takes the files out of the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(directory: Path) -> None:
    """Reads all bytes in their order."""
    buffer = bytearray(2**24)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main(argv: list[str]) -> None:
    """Parses the flags, writes the weights, times the ways in turn, prints."""
    parser = flags(__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/dehvf-load"))
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--transformers", action="store_true", help="also rank 0 reads all and sends shares")
    args = parser.parse_args(argv)
    world = read_world()
    init_process_group(world)
    directory = args.directory / f"{args.layers}-layers"
    on_main(world, lambda: write_checkpoint(directory, args.layers))
    config = LlamaConfig.from_pretrained(directory)
    ds_config = {"train_batch_size": world.size, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    partitions = Zero3Partitions(ds_config, world)

    def by_transformers() -> object:
        with partitions.filled_by_transformers(str(directory), 0):
            return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=DTYPE)

    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read_files(directory) if world.is_main else None,
        "shares": lambda: load_backbone(str(directory), config, DTYPE, vision=False, partitions=partitions),
    }
    if args.transformers:
        ways["transformers"] = by_transformers
    measure(ways, directory, args, world)


def measure(ways: dict[str, Callable[[], object]], directory: Path, args: Any, world: World) -> None:
    """Runs the ways in turn and prints their times and memory."""
    names, seconds, extra = list(ways), {name: [] for name in ways}, dict.fromkeys(ways, 0.0)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    share = total / world.size
    # The first load also imports; no round counts it.
    for number in range(-1, args.rounds):
        first = max(0, number) % len(names)
        for name in names[first:] + names[:first]:
            if world.is_main and not args.warm:
                forget(directory)
            torch.distributed.barrier()
            started = time.perf_counter()
            with PeakMemory() as memory:
                kept = ways[name]()
                torch.distributed.barrier()
            elapsed = time.perf_counter() - started
            del kept
            gc.collect()
            peaks = gather_to_main([memory.bytes], world)
            if world.is_main and number >= 0:
                seconds[name].append(elapsed)
                extra[name] = max(extra[name], *(peak - share * (name != "read") for peak in peaks))
    if not world.is_main:
        return
    state = "in the page cache" if args.warm else "not in the page cache"
    print(f"{total / 1e9:.1f} GB in bf16, {state}; {world.size} ranks, a share {share / 1e9:.2f} GB")
    for name in names:
        ratios = [own / read for own, read in zip(seconds[name], seconds["read"], strict=True)]
        print(
            f"{name:12s} {statistics.median(seconds[name]):6.2f} s; of read: {median_and_range(ratios)}; "
            f"memory of a rank above its share: {extra[name] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    run_entry(main, distributed=True)
