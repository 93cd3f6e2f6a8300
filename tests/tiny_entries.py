"""What the entries need to run: tiny backbones, scenes in shards, and a process to start them in."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from processes import REPOSITORY, USER_ENVIRONMENT, run_python
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, vision_config
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, GPT2Config, LlamaConfig

from dehvf_ds.data.building.__main__ import main as build_shards
from dehvf_ds.demo.make_scenes import main as make_scenes


def build_world(root: Path) -> Path:
    """Tiny backbones, scenes in shards, a recipe and a DeepSpeed JSON, in ``root``."""
    torch.manual_seed(0)
    llm = LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        bos_token_id=None,
        # As SmolLM2 is stored.
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(llm, dtype=torch.bfloat16).save_pretrained(root / "llm")
    byte_tokenizer().save_pretrained(root / "llm")
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=260)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(root / "gpt2")
    AutoModel.from_config(vision_config()).save_pretrained(root / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "tower")
    assert make_scenes(["--output", str(root / "scenes"), "--train", "24", "--val", "4", "--test", "4"]) == 0
    for split in ("train", "test"):
        annotations = root / f"scenes/annotations/captions_{split}.json"
        images = root / f"scenes/images/{split}"
        arguments = ["coco", "--annotations", str(annotations), "--images", str(images)]
        assert build_shards([*arguments, "--output", str(root / split), "--samples-per-shard", "5"]) == 0
    arguments = ["--root", str(root / "scenes/scienceqa"), "--split", "train"]
    assert build_shards(["scienceqa", *arguments, "--output", str(root / "scienceqa")]) == 0
    (root / "recipe.yaml").write_text(
        f"""
run_dir: {root}/runs/recipe
model:
  {{language_model: {root}/llm, vision_tower: {root}/tower, rank: 8, router_dim: 4, num_feature_layers: 2}}
data: {{train: {root}/train, max_tokens: 64, num_workers: 1}}
train: {{steps: 4, global_batch_size: 8, micro_batch_size: 2, save_every: 3, warmup_steps: 1, log_every: 1}}
"""
    )
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (root / "ds.json").write_text(json.dumps(zero3))
    return root


def overflowing_tower(world: Path) -> Path:
    """A tower of finite weights, as a base must have, whose features of a picture are not."""
    tower = world / "overflowing_tower"
    if not tower.exists():
        shutil.copytree(world / "tower", tower)
        tensors = load_file(tower / "model.safetensors")
        name = next(n for n in tensors if n.endswith("patch_embedding.weight"))
        tensors[name][:] = 3e38
        save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    return tower


def arguments(world: Path, run: str, *more: str) -> list[str]:
    fixed = ["--config", str(world / "recipe.yaml"), "--deepspeed", str(world / "ds.json")]
    return [*fixed, "--run_dir", str(world / "runs" / run), *more]


def start(entry: str, args: list[str], *, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an entry by its path in a process of its own, from another folder, as a user of ``home`` may."""
    env = USER_ENVIRONMENT if home is None else USER_ENVIRONMENT | {"HOME": str(home)}
    return run_python([REPOSITORY / entry, *args], env=env)


def steps(world: Path, run: str) -> list[dict[str, Any]]:
    """What a run wrote of each step."""
    lines = (world / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(world: Path, run: str) -> list[float]:
    """A run's losses."""
    return [line["train/loss"] for line in steps(world, run)]


def read_metrics(directory: Path) -> dict:
    """An evaluation's metrics, after a look at its predictions: one a sample."""
    metrics = json.loads((directory / "metrics.json").read_text())
    lines = (directory / "predictions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == metrics["num_samples"]
    return metrics
