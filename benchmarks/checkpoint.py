"""Seconds and bytes of a checkpoint with as many trainables as a 13B run has, under the real engine.

    python benchmarks/checkpoint.py --lora-rank 64

SmolLM2 with LoRA of rank 64 and a visual memory of rank 96 trains 4.5 M parameters, LLaMA-13B with rank 4 and
96 4.6 M. Also times the code of the metrics alone, without the step that it reports.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from bench import flags, random_batch, run_config, seconds_in_turn

from dehvf_ds.config import LoraConfig, RunConfig
from dehvf_ds.distributed import init_process_group, read_world
from dehvf_ds.training.checkpoint import Checkpoints, Progress, checkpoints_dir
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_engine, build_model_config
from dehvf_ds.training.metrics import MetricsWriter, Trackers, router_metrics
from dehvf_ds.training.step import train_step


def main() -> None:
    """Parses the flags, takes one step, saves five times."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--deepspeed", default="zero3")
    args = parser.parse_args()
    lora = LoraConfig(rank=args.lora_rank)
    bases = {"language_model": args.language_model, "vision_tower": args.vision_tower}
    with tempfile.TemporaryDirectory() as directory:
        measure(run_config(2, run_dir=directory, lora=lora, **bases), args.deepspeed)


def measure(config: RunConfig, deepspeed: str) -> None:
    """Builds the engine, takes one step, times saves and metrics."""
    world, run_dir = read_world(), Path(config.run_dir)
    ds_config = read_deepspeed_json(deepspeed, config, world.size)
    init_process_group(world)
    engine, model = build_engine(config, build_model_config(config.model, image_size=224), ds_config, world)
    dtype = compute_dtype(ds_config)
    result = train_step(engine, [random_batch(2, 16)], world, dtype, seed=0, step=1)
    checkpoints = Checkpoints(config, world, model, engine, dtype, "digest")
    saves = []
    for step in range(1, 6):
        started = time.perf_counter()
        checkpoints.save(Progress(step=step), last=False)
        assert not checkpoints.failures
        saves.append(round(time.perf_counter() - started, 3))
    saved = checkpoints_dir(run_dir) / "step_00000005"
    num_bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    writer = MetricsWriter(run_dir, Trackers([], run_dir, {}, 0), num_steps=1000, log_every=1000)
    fixed = dict.fromkeys(("train/loss", "lr", "seconds", "samples_per_s", "tokens_per_s"), 1.0)
    runs = {
        "metrics": lambda: [writer.write({"step": step, **fixed}) for step in range(1, 101)],
        "feature_layers": lambda: router_metrics(model, result.router_weights),
    }
    (seconds,) = seconds_in_turn(runs, 1, warm_ups=0)
    writer.close()
    found = {
        "trainable": sum(p.ds_numel for p in model.trainable_parameters().values()),
        "save_s": saves,
        "checkpoint_mb": round(num_bytes / 1e6, 1),
        "metrics_ms_a_step": round(10 * seconds["metrics"], 3),
        "levels_ms_a_call": round(1000 * seconds["feature_layers"], 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
