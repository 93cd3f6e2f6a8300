"""Tiny backbones of odd sizes, shards and a recipe for the tests of checkpoints."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image
from tiny_models import byte_tokenizer, text_config, vision_config
from tiny_shards import write_shards
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil

from dehvf_ds.data.shards import ShardRow


def build_world(root: Path) -> Path:
    """Writes everything that ``recipe`` names."""
    torch.manual_seed(0)
    llm = text_config()
    # One id a byte; the tokenizer's end of text is 0.
    llm.vocab_size, llm.bos_token_id, llm.eos_token_id = 260, None, 0
    AutoModelForCausalLM.from_config(llm).save_pretrained(root / "llm")
    byte_tokenizer().save_pretrained(root / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(root / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "tower")
    for name, first in (("train", 0), ("other", 100)):
        rows = (_row(first + i) for i in range(23))
        write_shards(rows, root / name, name=name, samples_per_shard=5, builder={})
    return root


def recipe(world: Path) -> str:
    """Path of the recipe over ``build_world``; rank 7 and router width 5 divide by no number of ranks."""
    path = world / "recipe.yaml"
    path.write_text(
        f"""
run_dir: {world}/run
model:
  language_model: {world}/llm
  vision_tower: {world}/tower
  rank: 7
  router_dim: 5
  feature_layers: [1, 3, 4]
  lora: {{rank: 3}}
data: {{train: {world}/train, max_tokens: 40, num_workers: 1}}
train:
  {{global_batch_size: 8, micro_batch_size: 1, lr: 0.0005, warmup_steps: 2, log_every: 1, router_every: 4}}
"""
    )
    return str(path)


def _row(number: int) -> ShardRow:
    record = {"captions": [f"Row {number} says {'so ' * (number % 5)}much."]}
    file = io.BytesIO()
    Image.new("RGB", (20, 18), (number * 7 % 256, 30, 200)).save(file, "PNG")
    return ShardRow(key=f"row{number}", members={"json": json.dumps(record).encode(), "png": file.getvalue()})
