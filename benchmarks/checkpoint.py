"""Seconds and bytes of a checkpoint with as many trainables as a 13B run has, under the real engine.

    python benchmarks/checkpoint.py --lora-rank 64

SmolLM2 with LoRA of rank 64 and a visual memory of rank 96 trains 4.5 M parameters, LLaMA-13B with rank 4 and
96 4.6 M. Also times the code of the metrics alone, without the step that it reports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from timing import random_batch

from dehvf_ds.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from dehvf_ds.distributed import init_process_group, read_world
from dehvf_ds.training.checkpoint import Checkpoints, Progress, checkpoints_dir
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.metrics import MetricsWriter, router_metrics
from dehvf_ds.training.step import train_step


def main() -> None:
    """Parses the flags, takes one step, saves five times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language-model", default="demo_data/backbones/smollm2-135m")
    parser.add_argument("--vision-tower", default="demo_data/backbones/dinov2-small")
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = RunConfig(
            run_dir=directory,
            model=ModelConfig(
                language_model=args.language_model,
                vision_tower=args.vision_tower,
                lora=LoraConfig(rank=args.lora_rank),
            ),
            data=DataConfig(train="unused"),
            train=TrainConfig(global_batch_size=2, micro_batch_size=2),
            deepspeed=args.deepspeed,
        )
        measure(config, Path(directory))


def measure(config: RunConfig, run_dir: Path) -> None:
    """Builds the engine, takes one step, times saves and metrics."""
    world = read_world()
    ds_config = read_deepspeed_json(config.deepspeed, config, world.size)
    init_process_group(world)
    engine, model = build_engine(config, build_model_config(config.model, image_size=224), ds_config, world)
    dtype = compute_dtype(ds_config)
    batch = random_batch(2, 16)
    result = train_step(engine, [batch], world, dtype, seed=0, step=1)
    checkpoints = Checkpoints(config, world, model, engine, dtype, "digest")
    seconds = []
    for step in range(1, 6):
        started = time.perf_counter()
        assert checkpoints.save(Progress(step=step))
        seconds.append(round(time.perf_counter() - started, 3))
    saved = checkpoints_dir(run_dir) / "step_00000005"
    num_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())

    writer = MetricsWriter(run_dir, 1000, 1000)
    fixed = dict.fromkeys(("train/loss", "lr", "seconds", "samples_per_s", "tokens_per_s"), 1.0)
    started = time.perf_counter()
    for step in range(1, 101):
        writer.write({"step": step, **fixed})
    written = (time.perf_counter() - started) / 100
    started = time.perf_counter()
    router_metrics(model, result.level_weights)
    levels = time.perf_counter() - started
    writer.close()
    trainable = sum(p.ds_numel for p in model.trainable_parameters().values())
    print(
        json.dumps(
            {
                "trainable": trainable,
                "save_s": seconds,
                "checkpoint_mb": round(num_bytes / 1e6, 1),
                "metrics_ms_a_step": round(1000 * written, 3),
                "levels_ms_a_call": round(1000 * levels, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
