"""Evaluates a trained model on shards: captions, scores and example pictures.

    python dehvf_ds/eval.py --model RUN_DIR --data SHARDS [--split test]

Under ``deepspeed``, ``torchrun`` or ``srun`` every rank holds a whole model and takes its own rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.batch import Batch, Sample
from dehvf_ds.config import EvalConfig, UserError, parse_eval_config, to_plain
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import read_all, read_sample
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import (
    World,
    all_reduce_sum,
    gather_to_main,
    has_fast_bf16,
    init_process_group,
    read_world,
    run_entry,
)
from dehvf_ds.evals.coco import score_captions
from dehvf_ds.evals.decode import greedy_answers, summed_loss
from dehvf_ds.insight.pictures import contact_sheet
from dehvf_ds.model import ModelError
from dehvf_ds.model.weights import TrainedModel, find_trained

NUM_EXAMPLES = 8


def main(argv: list[str]) -> int:
    """Runs one evaluation; returns the exit code.

    Raises:
        UserError: anything in the flags or files that the user must mend.
    """
    config = parse_eval_config(argv)
    world = read_world()
    index = ShardIndex(config.data)
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
    except ModelError as error:
        raise UserError(str(error)) from None
    if index.num_without_captions:
        raise UserError(f"{config.data}: holds rows without captions; --task coco cannot score them")
    output = _output_dir(config)
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    init_process_group(world)
    try:
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16()).to(world.device)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        raise UserError(str(error)) from None

    num_rows = min(len(index), config.max_samples or len(index))
    own_rows = range(world.rank, num_rows, world.size)
    prompt = config.prompt or trained.config.prompt
    settings = {"task": "caption", "prompt": prompt}
    prompts = Collator(tokenizer, transform, **settings, max_tokens=512, for_generation=True)
    rows = islice(read_all(index, rank=world.rank, world_size=world.size), len(own_rows))
    batches = (prompts(group) for group in _groups(rows, config.batch_size))
    own = []
    for row, (key, text) in zip(
        own_rows, greedy_answers(model, batches, tokenizer, config.max_new_tokens), strict=True
    ):
        own.append((row, {"key": key, "prediction": text}))
        if world.is_main and len(own) % 32 == 0:
            print(f"captioned {len(own) * world.size}/{num_rows}", flush=True)
    loss = None
    if config.loss:
        targets = Collator(tokenizer, transform, **settings, max_tokens=512)
        loss = _mean_loss(model, index, own_rows, targets, config.batch_size, world)
    predictions = [item for _, item in sorted(gather_to_main(own, world), key=lambda pair: pair[0])]
    if world.is_main:
        _score_and_write(config, trained, index, predictions, loss, output)
    return 0


def _score_and_write(
    config: EvalConfig,
    trained: TrainedModel,
    index: ShardIndex,
    predictions: list[dict],
    loss: float | None,
    output: Path,
) -> None:
    # One row at a time: the pictures of a whole split would not fit into memory.
    members = (index.read(row) for row in range(len(predictions)))
    references = {item["__key__"]: json.loads(item["json"])["captions"] for item in members}
    scores, each = score_captions(references, {item["key"]: item["prediction"] for item in predictions})
    output.mkdir(parents=True, exist_ok=True)
    with (output / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for item in predictions:
            line = item | {"references": references[item["key"]], "scores": each[item["key"]]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    metrics = {
        **{name: round(value, 4) for name, value in scores.items()},
        **({} if loss is None else {"loss": loss}),
        "num_samples": len(predictions),
        "protocol": {"tokenizer": "PTB", "decoding": "greedy", "max_new_tokens": config.max_new_tokens},
        "model": {"path": config.model, "fusion": trained.config.fusion, "router": trained.config.router},
        "arguments": to_plain(config),
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    shown = _spread(len(predictions), NUM_EXAMPLES)
    contact_sheet(
        [read_sample(index, i).image or Image.new("RGB", (1, 1), "white") for i in shown],
        [predictions[i]["prediction"] for i in shown],
        output / "examples.png",
        references=[references[predictions[i]["key"]][0] for i in shown],
    )
    print("  ".join(f"{name} {value:.1f}" for name, value in scores.items()))
    print(f"metrics: {output / 'metrics.json'}   examples: {output / 'examples.png'}", flush=True)


def _mean_loss(
    model, index: ShardIndex, own_rows, collator: Collator, batch_size: int, world: World
) -> float:
    rows = (
        read_sample(index, row, caption=caption)
        for row in own_rows
        for caption in range(int(index.captions[row]))
    )
    batches: Iterable[Batch] = (collator(group) for group in _groups(rows, batch_size))
    loss_sum, num_tokens = all_reduce_sum(list(map(float, summed_loss(model, batches))), world.device)
    return loss_sum / max(num_tokens, 1.0)


def _output_dir(config: EvalConfig) -> Path:
    split = config.split or Path(config.data).name
    return Path(config.output or Path(config.model) / "eval") / f"{config.task}-{split}"


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


def _spread(total: int, count: int) -> list[int]:
    """``count`` of the indices below ``total``, evenly spaced."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


if __name__ == "__main__":
    run_entry(main)
