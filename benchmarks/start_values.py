"""Trains the demo's recipe under several start values of the visual read, and says what each learns of it.

    python benchmarks/start_values.py --spec a=36,b=1 --spec a=36,b=4,lr=4e-3 [--device cuda] [--output FILE]

``a`` fills the scales of the queries (the spread of the scores), ``b`` over sqrt(M) those of the read (its
size); ``lr``, ``steps`` and ``seed`` may follow. Plain torch, fp32 masters beside bf16 weights; the tower
runs once, for its outputs do not change. Prints a JSON line a spec: loss a
token and F1 of the words for colour, texture and shape in greedy captions, on scenes that were never shown.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import LORA, flags
from PIL import Image
from torch import Tensor

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.config import TrainConfig
from dehvf_ds.data.collate import Collator, build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.demo.outcome import score_words
from dehvf_ds.evaluation.decode import Decoding, decode
from dehvf_ds.model import DehvfForConditionalGeneration, ffn
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.model.features import visual_features
from dehvf_ds.training.engine import learning_rate, parameter_groups

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
    """One split: its rows, and the tower's feature layers of all its pictures."""

    def __init__(self, model: SeenModel, directory: Path, tower: str, tokenizer: Any):
        self.index = ShardIndex(directory)
        transform = build_image_transform(tower, model.config.image_size)
        device, rows, parts = model.projector.bias.device, range(len(self.index)), []
        for first in range(0, len(rows), 50):
            images = [read_sample(self.index, row).image for row in rows[first : first + 50]]
            pixels = torch.stack([transform(image) for image in images if image]).to(device).to(DTYPE)
            parts.append(visual_features(model.vision_tower, pixels, model.config.feature_layers))
        self.features = torch.cat(parts)
        settings: dict[str, Any] = {"task": "caption", "max_tokens": 48}
        self.collators = {
            asked: Collator(tokenizer, _NoPicture(), for_generation=asked, **settings)  # pyright: ignore
            for asked in (False, True)
        }

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
    parser = flags(__doc__)
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
    seed = int(given.get("seed", 0))
    bases = [str(data / "backbones" / name) for name in ("smollm2-135m", "dinov2-small")]
    config = build_config(*bases, num_feature_layers=6, image_size=224, lora=LORA)
    model: Any = load_model(config, *bases, dtype=DTYPE, seed=seed).to(device)
    model.__class__ = SeenModel
    if given.get("norm") == "0":
        ffn.F = SimpleNamespace(silu=torch.nn.functional.silu, rms_norm=lambda x, *_, **__: x)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("scale_in") and "a" in given:
            parameter.data.fill_(float(given["a"]))
        if name.endswith("scale_out"):
            size = float(given.get("b", ffn.READ_SIZE))
            parameter.data.fill_(size * model.config.num_slots**-0.5)
    tokenizer = load_tokenizer(bases[0])
    scenes = {s: Scenes(model, data / "scenes/shards" / s, bases[1], tokenizer) for s in ("train", "test")}
    began = time.monotonic()
    sizes = {"global_batch_size": 16, "micro_batch_size": 16}
    train_config = TrainConfig(steps=int(given.get("steps", 120)), lr=float(given.get("lr", 2e-3)), **sizes)
    losses = train(model, scenes["train"], train_config, seed)
    found = measure(model, scenes["test"], tokenizer)
    seconds = round(time.monotonic() - began)
    return found | {"train_last_20": round(sum(losses[-20:]) / 20, 4), "seconds": seconds}


def train(model: SeenModel, scenes: Scenes, config: TrainConfig, seed: int) -> list[float]:
    """The recipe's steps; returns each step's loss."""
    assert config.steps is not None
    named = model.train().trainable_parameters()
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
        model.zero_grad()
        output = model(**batch.inputs())
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
            tokens += output.num_supervised.item()
        batch = scenes.batch(model, [(row, 0) for row in rows], asked=True)
        answers = decode(model, batch, tokenizer, Decoding(max_new_tokens=40))
        truths = [scenes.sample(row, 0).record["captions"][0] for row in rows]
        captions += [(answer.text, truth) for answer, truth in zip(answers, truths, strict=True)]
    words = {kind: round(f1, 3) for kind, f1 in score_words(captions).items()}
    return {"test_loss": round(loss / tokens, 4)} | words


if __name__ == "__main__":
    main()
