"""Trains the demo's recipe under several start values of the visual read, and says what each learns of it.

    python benchmarks/start_values.py --spec a=36,b=1 --spec a=36,b=4,lr=4e-3 [--device cuda] [--output FILE]

``a`` fills the gains of the queries (the spread of the scores), ``b`` over sqrt(M) those of the read (its
size); ``lr``, ``steps``, ``seed`` and ``norm=0`` (queries as they come) may follow. Plain torch, fp32 masters
beside bf16 weights; the tower runs once, for its outputs do not change. Prints a JSON line a spec: loss a
token and F1 of the words for colour, texture and shape in greedy captions, on scenes that were never shown.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.config import TrainConfig
from dehvf_ds.data.collate import Collator, build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.demo.outcome import score_words
from dehvf_ds.model import DehvfForConditionalGeneration, visual_ffn
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.model.features import visual_features as visual_levels
from dehvf_ds.training.optim import learning_rate, parameter_groups

CAPTIONS_A_PICTURE = 5
DTYPE = torch.bfloat16


class SeenModel(DehvfForConditionalGeneration):
    """The model with the tower's outputs given instead of pictures."""

    features: Tensor

    def encode_images(self, pixel_values: Tensor, has_image: Tensor | None) -> tuple[Tensor, Tensor]:
        """The memory of the features that were set last."""
        present = torch.ones(len(self.features), dtype=torch.bool, device=self.features.device)
        return self.fuser(self.features[:, :, 0], self.projector(self.features), present)


class Scenes:
    """One split: its rows, and the tower's levels of all its pictures."""

    def __init__(self, model: SeenModel, directory: Path, tower: str, tokenizer: Any):
        self.index = ShardIndex(directory)
        transform = build_image_transform(tower, model.config.image_size)
        rows = range(len(self.index))
        device = model.projector.bias.device
        parts = [
            visual_levels(
                model.vision_tower,
                torch.stack(
                    [transform(picture) for row in rows[i : i + 50] if (picture := self.picture(row))]
                )
                .to(device)
                .to(DTYPE),
                model.config.levels,
            )
            for i in range(0, len(rows), 50)
        ]
        self.features = torch.cat(parts)
        settings: dict[str, Any] = {"task": "caption", "max_tokens": 48}
        self.collators = {
            asked: Collator(tokenizer, _NoPicture(), for_generation=asked, **settings)  # pyright: ignore
            for asked in (False, True)
        }

    def picture(self, row: int) -> Image.Image | None:
        """A row's picture."""
        return read_sample(self.index, row).image

    def sample(self, row: int, caption: int) -> Sample:
        """A row with one of its captions, without its picture."""
        return replace(read_sample(self.index, row, caption=caption), image=None)

    def batch(self, model: SeenModel, rows: list[tuple[int, int]], *, asked: bool = False) -> Batch:
        """Collates (row, caption) pairs and hands their features to the model."""
        model.features = self.features[[row for row, _ in rows]]
        batch = self.collators[asked]([self.sample(row, caption) for row, caption in rows])
        present = torch.ones(len(rows), dtype=torch.bool)
        return replace(batch, has_image=present).to(model.features.device, DTYPE)


class _NoPicture:
    image_size = 4

    def __call__(self, image: Image.Image) -> Tensor:
        raise AssertionError


def main() -> None:
    """Trains one model a spec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", action="append", required=True)
    parser.add_argument("--data", type=Path, default=Path("demo_data"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="appends the lines to this file, too")
    args = parser.parse_args()
    for spec in args.spec:
        line = json.dumps({"spec": spec} | run(spec, args.data, args.device))
        print(line, flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(line + "\n")


def run(spec: str, data: Path, device: str) -> dict[str, Any]:
    """Trains with one spec and measures."""
    given = dict(part.split("=") for part in spec.split(","))
    steps, seed = int(given.get("steps", 120)), int(given.get("seed", 0))
    llm, tower = (str(data / "backbones" / name) for name in ("smollm2-135m", "dinov2-small"))
    model = _build(llm, tower, seed, device)
    if given.get("norm") == "0":
        visual_ffn._queries = lambda x, w_query: x @ w_query
    named = model.trainable_parameters()
    for name, parameter in named.items():
        if name.endswith("gain_in") and "a" in given:
            parameter.data.fill_(float(given["a"]))
        if name.endswith("gain_out"):
            size = float(given.get("b", visual_ffn.READ_SIZE))
            parameter.data.fill_(size * model.config.num_slots**-0.5)
    tokenizer = load_tokenizer(llm)
    scenes = {s: Scenes(model, data / "scenes/shards" / s, tower, tokenizer) for s in ("train", "test")}
    began = time.monotonic()
    config = TrainConfig(
        steps=steps, lr=float(given.get("lr", 2e-3)), global_batch_size=16, micro_batch_size=16
    )
    losses = train(model, scenes["train"], config, seed)
    found = measure(model, scenes["test"], tokenizer)
    return found | {
        "train_last_20": round(sum(losses[-20:]) / 20, 4),
        "seconds": round(time.monotonic() - began),
    }


def train(model: SeenModel, scenes: Scenes, config: TrainConfig, seed: int) -> list[float]:
    """The recipe's steps; returns each step's loss."""
    assert config.steps is not None
    named = model.trainable_parameters()
    masters = {name: torch.nn.Parameter(p.data.float()) for name, p in named.items()}
    groups = parameter_groups(masters, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    drawn = [(row, caption) for row in range(len(scenes.index)) for caption in range(CAPTIONS_A_PICTURE)]
    random.Random(seed).shuffle(drawn)
    losses = []
    for step in range(config.steps):
        first = step * config.global_batch_size
        batch = scenes.batch(model, drawn[first : first + config.global_batch_size])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, config.steps)
        output = model.train()(**batch.inputs())
        model.zero_grad()
        output.loss.backward()
        for name, parameter in named.items():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), config.max_grad_norm)
        optimizer.step()
        for name, parameter in named.items():
            parameter.data.copy_(masters[name].data)
        losses.append(output.loss.item())
    return losses


@torch.no_grad()
def measure(model: SeenModel, scenes: Scenes, tokenizer: Any) -> dict[str, float]:
    """Loss a token over two captions of each picture, and F1 of words in its greedy caption."""
    model.eval()
    loss = tokens = 0.0
    captions = []
    for first in range(0, len(scenes.index), 25):
        rows = range(first, min(first + 25, len(scenes.index)))
        for caption in (0, 2):
            output = model(**scenes.batch(model, [(row, caption) for row in rows]).inputs())
            loss += output.loss_sum.item()
            tokens += output.num_tokens.item()
        batch = scenes.batch(model, [(row, 0) for row in rows], asked=True)
        ids = model.generate(
            batch.input_ids,
            batch.pixel_values,
            attention_mask=batch.attention_mask,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            captions.append((text, scenes.sample(row, 0).record["captions"][0]))
    words = {kind: round(f1, 3) for kind, f1 in score_words(captions).items()}
    return {"test_loss": round(loss / tokens, 4)} | words


def _build(llm: str, tower: str, seed: int, device: str) -> SeenModel:
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["down_proj"]}
    config = build_config(llm, tower, num_levels=6, image_size=224, lora=lora)
    model: Any = load_model(config, llm, tower, dtype=DTYPE, seed=seed).to(device)
    model.__class__ = SeenModel
    return model


if __name__ == "__main__":
    main()
