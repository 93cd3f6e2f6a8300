"""One rank that loads backbones into ZeRO-3's partitions and compares them with what transformers loads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from dehvf_ds.config import UserError
from dehvf_ds.distributed import World, gather_to_main, init_process_group, read_world, run_entry
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.training.zero import Zero3Partitions


class Watched(Zero3Partitions):
    """Counts the backbones whose shares were read from their files."""

    num_read = 0

    def read(self, tensors) -> None:
        super().read(tensors)
        self.num_read += 1


def compare(bases: dict[str, str], dtype: torch.dtype, zero: dict[str, Any], world: World) -> int:
    """Every parameter and buffer, gathered; returns how many backbones were read in shares."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    config: dict[str, Any] = {"num_feature_layers": 2, "rank": 8, "lora": None}
    expected = load_model(build_config(**bases, **config), **bases, dtype=dtype)
    ds_config = {"train_batch_size": world.size, "zero_optimization": {"stage": 3} | zero}
    ds_config["bf16"] = {"enabled": dtype == torch.bfloat16}
    partitions = Watched(ds_config, world)
    model = load_model(build_config(**bases, **config), **bases, dtype=dtype, partitions=partitions)
    wanted, found = (dict(m.named_parameters(remove_duplicate=False)) for m in (expected, model))
    assert wanted.keys() == found.keys()
    trained = set(model.trainable_parameters().values())
    frozen = [p for p in model.parameters() if p not in trained]
    assert frozen
    assert all(not p.numel() for p in frozen)
    with GatheredParameters(frozen):
        assert_equal(found, wanted)
    # As the engine gathers, under hpZ from the shares within the node.
    gather: Any = frozen[0]
    gather.all_gather_coalesced(frozen).wait()
    assert_equal(found, wanted)
    embedding, head = (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert (embedding is head) == expected.config.text_config.tie_word_embeddings
    buffers, others = dict(expected.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == others.keys()
    for name, buffer in buffers.items():
        assert others[name].dtype == buffer.dtype, name
        assert torch.equal(others[name], buffer), name
    for own, other in zip(parts(model), parts(expected), strict=True):
        assert own.name_or_path == other.name_or_path
        assert own.config.to_dict() == other.config.to_dict()
        assert own.training is other.training
    assert parts(model)[0].generation_config == parts(expected)[0].generation_config
    return partitions.num_read


def assert_equal(found: Mapping[str, torch.nn.Parameter], wanted: Mapping[str, torch.nn.Parameter]) -> None:
    for name, parameter in found.items():
        assert parameter.dtype == wanted[name].dtype, name
        assert parameter.requires_grad == wanted[name].requires_grad, name
        assert torch.equal(parameter.data, wanted[name].data), name


def parts(model) -> list[Any]:
    return [model.language_model, model.vision_tower]


def peak_memory(bases: dict[str, str], world: World) -> float:
    """How far a load raises this rank's memory, pages of mapped files included, as a share of the weights."""
    num_bytes = sum(
        file.stat().st_size for base in bases.values() for file in Path(base).glob("*.safetensors")
    )
    config = build_config(**bases, num_feature_layers=2, rank=8, lora=None)
    ds_config = {"train_batch_size": world.size, "zero_optimization": {"stage": 3}}
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(config, **bases, dtype=torch.float32, partitions=Zero3Partitions(ds_config, world))
    done.set()
    thread.join()
    assert all(not p.numel() for p in model.vision_tower.parameters())
    return (peak - before) / num_bytes


def refusal(bases: dict[str, str], world: World) -> str:
    """What a load says that cannot be."""
    ds_config = {"train_batch_size": world.size, "zero_optimization": {"stage": 3}}
    config, partitions = (
        build_config(**bases, num_feature_layers=2, rank=8),
        Zero3Partitions(ds_config, world),
    )
    try:
        load_model(config, **bases, dtype=torch.float32, partitions=partitions)
    except UserError as error:
        return str(error)
    raise AssertionError("ranks with different weights were loaded")


def main(args: list[str]) -> None:
    world = read_world()
    init_process_group(world)
    found = []
    for job in json.loads(args[1]):
        if other := job.get("other"):
            found.append(refusal(job["bases"] | (other if world.rank == 1 else {}), world))
        elif job["measure"]:
            found.append(peak_memory(job["bases"], world))
        else:
            found.append(compare(job["bases"], getattr(torch, job["dtype"]), job["zero"], world))
    result = gather_to_main(found, world)
    if world.is_main:
        Path(args[0]).write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_entry(main, distributed=True)
