"""One rank of a DeepSpeed job that tests start: trains a tiny model on made-up batches, writes losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from dehvf_ds.distributed import World, gather_to_main, init_process_group, read_world, run_entry

GLOBAL_BATCH = 8


def make_rows(step: int, kind: str) -> Batch:
    """The rows of one optimizer step; ``kind`` mixes text-only rows and uneven lengths in.

    In ``shared`` some rows show the same picture, and in some steps a rank's rows show none.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    input_ids = torch.randint(3, 64, (GLOBAL_BATCH, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    has_image = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
    labels = input_ids.clone()
    labels[:, :3] = IGNORE_INDEX
    if kind != "pictures":
        for row in range(GLOBAL_BATCH):
            length = 5 + (row * 3 + step) % 8
            attention_mask[row, length:] = 0
        labels[attention_mask == 0] = IGNORE_INDEX
        has_image[:] = torch.rand(GLOBAL_BATCH, generator=generator) < 0.5
        if step % 5 == 1:
            has_image[:] = False
        if step % 5 == 2:
            # The second half of the rows, one rank's share, has nothing to learn from.
            labels[GLOBAL_BATCH // 2 :] = IGNORE_INDEX
    pixels = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    if kind == "shared":
        pixels = pixels[torch.arange(GLOBAL_BATCH) // 4 * 4]
        has_image[: GLOBAL_BATCH // 2] |= step % 5 != 1
        has_image[GLOBAL_BATCH // 2 :] &= step % 2 == 0
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        pixel_values=pixels * has_image[:, None, None, None],
        has_image=has_image,
    )


def take(batch: Batch, start: int, count: int) -> Batch:
    """Rows ``start .. start + count``."""
    return Batch(**{name: value[start : start + count] for name, value in batch.inputs().items()})


def share(batch: Batch) -> Batch:
    """The same rows, with each picture once."""
    rows = [row for row in range(len(batch.input_ids)) if batch.has_image[row]]
    if not rows:
        shown = torch.zeros(len(batch.input_ids), dtype=torch.long)
        return replace(batch, pixel_values=batch.pixel_values[:1], picture=shown)
    pictures, numbers = batch.pixel_values[rows].unique(dim=0, return_inverse=True)
    shown = torch.zeros(len(batch.input_ids), dtype=torch.long).index_put((torch.tensor(rows),), numbers)
    return replace(batch, pixel_values=pictures, picture=shown)


def run_config(directory: Path, case: dict) -> RunConfig:
    """The run's configuration over the tiny backbones in ``directory``."""
    return RunConfig(
        run_dir=str(directory / "run"),
        model=ModelConfig(
            language_model=str(directory / "llm"),
            vision_tower=str(directory / "tower"),
            fusion=case.get("fusion", "ffn"),
            router=case.get("router", "layer"),
            feature_layers=(1, 2, 4),
            rank=8,
            router_dim=4,
            image_size=None,
            lora=LoraConfig(rank=2),
        ),
        data=DataConfig(train="unused"),
        train=TrainConfig(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=case["micro_batch_size"],
            # Adam brings gradients that are rounding noise to full size, and the noise depends on the
            # processor: at 2e-3 losses differed by 2.5e-5 on one of two.
            lr=5e-4,
            warmup_steps=2,
            activation_checkpointing=case.get("activation_checkpointing", False),
            compile=case.get("compile", False),
        ),
        seed=3,
    )


def main(directory: Path, case: dict) -> None:
    from deepspeed.utils import groups

    from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
    from dehvf_ds.training.engine import (
        GradientWatch,
        build_engine,
        build_model_config,
        learning_rate,
        set_learning_rate,
    )
    from dehvf_ds.training.step import train_step
    from dehvf_ds.training.zero import full_model, gather_trainables, gathered_units

    world = read_world()
    init_process_group(world)
    config = run_config(directory, case)
    ds_config = read_deepspeed_json(str(directory / "ds.json"), config, world.size)
    engine, model = build_engine(config, build_model_config(config.model), ds_config, world)
    micro_size, per_rank = config.train.micro_batch_size, GLOBAL_BATCH // world.size
    watch = GradientWatch(model.trainable_parameters())
    dtype = compute_dtype(ds_config)
    losses, taken, found, shapes, whole = [], [], {}, set(), []
    for step in range(case["steps"]):
        set_learning_rate(engine.optimizer.param_groups, learning_rate(step, config.train, case["steps"]))
        rows = make_rows(step, case["kind"])
        if step in case.get("poison", []):
            rows.pixel_values[0] = float("nan")
        own = take(rows, world.rank * per_rank, per_rank)
        if step == case.get("decode_at"):
            with full_model(model, world) as full:
                found |= decode(engine, full, own, world)
        micro = [take(own, start, micro_size) for start in range(0, per_rank, micro_size)]
        if case["kind"] == "shared":
            micro = [share(batch) for batch in micro]
            shapes |= {(len(b.pixel_values), int(b.has_image.sum())) for b in micro}
        losses.append(train_step(engine, micro, world, dtype, seed=config.seed, step=step).loss)
        taken.append(engine.was_step_applied())
        if step == 0:
            found["silent"] = watch.finish()
        if step == case.get("decode_at", 0):
            # Held, so that whatever is gathered anew lies elsewhere.
            whole = [(p, p.data) for p in model.parameters() if getattr(p, "ds_persist", False)]
    shapes = {tuple(shape) for shape in gather_to_main([*shapes], world)}
    trained = gather_trainables(model.trainable_parameters())
    if world.is_main:
        torch.save(trained, directory / "trained.pt")
        buffers = sorted({str(b.dtype) for b in model.buffers() if b.is_floating_point()})
        secondary = groups._get_zero_param_intra_parallel_group()
        hpz = None if secondary is None else torch.distributed.get_world_size(secondary)
        if ds_config["zero_optimization"]["stage"] == 3:
            units = gathered_units(model)
            hooked = [sum("pre_bwd_fn" in vars(m) for m in unit.modules()) for unit in units]
            stayed = {p.requires_grad: 0 for p, _ in whole}
            for parameter, data in whole:
                stayed[parameter.requires_grad] += parameter.data_ptr() == data.data_ptr()
            found |= {
                "hooked": hooked,
                "stayed": [stayed.get(trained) for trained in (False, True)],
                "whole": sum(not p.requires_grad for p, _ in whole),
                "traced": engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace(),
            }
        found |= {
            "shapes": sorted(shapes),
            "buffers": buffers,
            "losses": losses,
            "taken": taken,
            "hpz_ranks": hpz,
        }
        (directory / "result.json").write_text(json.dumps(found))


def decode(engine, full, rows: Batch, world: World) -> dict[str, Any]:
    """Losses of the engine's model and of the full one on the same rows, and texts of unequal length."""
    engine.eval()
    with torch.no_grad():
        losses = [float(model(**rows.inputs()).loss_sum) for model in (engine, full)]
    engine.train()
    full.eval()
    ids = full.generate(
        rows.input_ids[:, :4],
        rows.pixel_values,
        rows.has_image,
        max_new_tokens=3 + 5 * world.rank,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return {"losses_of_both": losses, "lengths": gather_to_main([ids.shape[1]], world)}


if __name__ == "__main__":
    run_entry(lambda args: main(Path(args[0]), json.loads(args[1])))
