"""One rank of a run in whose middle a copy of the model decodes, or does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from zero_worker import GLOBAL_BATCH, make_rows, run_config, take

from dehvf_ds.batch import Batch
from dehvf_ds.distributed import World, gather_to_main, init_process_group, read_world, run_entry
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.step import train_step
from dehvf_ds.training.zero import full_model


def main(directory: Path) -> None:
    """Trains the same six steps twice, the second time with a copy that decodes in their middle."""
    world = read_world()
    init_process_group(world)
    config = run_config(directory, {"micro_batch_size": 2})
    ds_config = read_deepspeed_json(str(directory / "ds.json"), config, world.size)
    half = GLOBAL_BATCH // 2
    found: dict[str, Any] = {"losses": [[], []]}
    for losses in found["losses"]:
        engine, model = build_engine(config, build_model_config(config.model), ds_config, world)
        for step in range(6):
            rows = take(make_rows(step, "mixed"), world.rank * half, half)
            if losses is found["losses"][1] and step == 3:
                with full_model(model, world) as whole:
                    found |= decode(engine, whole, rows, world)
            micro = [take(rows, i, 2) for i in range(0, half, 2)]
            losses.append(train_step(engine, micro, world, torch.float32, seed=0, step=step).loss)
    if world.is_main:
        (directory / "result.json").write_text(json.dumps(found))


def decode(engine, copy, rows: Batch, world: World) -> dict[str, Any]:
    """Losses of both on the same rows, and texts of another length on every rank."""
    engine.eval()
    with torch.no_grad():
        losses = [float(model(**rows.inputs()).loss_sum) for model in (engine, copy)]
    engine.train()
    copy.eval()
    ids = copy.generate(
        rows.input_ids[:, :4],
        rows.pixel_values,
        rows.has_image,
        max_new_tokens=3 + 5 * world.rank,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return {"losses_of_both": losses, "num_tokens": gather_to_main([ids.shape[1]], world)}


if __name__ == "__main__":
    run_entry(lambda args: main(Path(args[0])))
