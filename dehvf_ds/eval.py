"""Evaluates a trained model on shards: answers, scores and example pictures.

    python dehvf_ds/eval.py --model RUN_DIR --data SHARDS [--task coco|scienceqa] [--split test]

Under ``deepspeed``, ``torchrun`` or ``srun`` every rank holds a whole model and takes its own rows. A killed
evaluation goes on where it was when it is started again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.batch import Sample
from dehvf_ds.config import EvalConfig, ScienceqaConfig, UserError, parse_eval_config, to_plain
from dehvf_ds.data.collate import Collator, letter_ids
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import read_sample
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX
from dehvf_ds.data.shards import parse_record
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import (
    World,
    all_reduce_sum,
    has_fast_bf16,
    init_process_group,
    read_world,
    run_entry,
)
from dehvf_ds.evals import scienceqa
from dehvf_ds.evals.answering import answer_rows
from dehvf_ds.evals.coco import score_captions, unique_predictions
from dehvf_ds.evals.coco_tokens import require_java
from dehvf_ds.evals.decode import Decoding, decode_answers, likeliest_options, summed_loss
from dehvf_ds.evals.parts import AnswerParts
from dehvf_ds.insight.pictures import contact_sheet
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.weights import TrainedModel, find_trained

NUM_EXAMPLES = 8
MAX_NEW_TOKENS = {"coco": 40, "scienceqa": 8}


def main(argv: list[str]) -> int:
    """Runs one evaluation; returns the exit code.

    Raises:
        UserError: anything in the flags or files that the user must mend.
    """
    config = parse_eval_config(argv)
    world = read_world()
    index = ShardIndex(config.data)
    _check_rows(config, index)
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
    except ModelError as error:
        raise UserError(str(error)) from None
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    settings = {
        "task": "caption" if config.task == "coco" else "scienceqa",
        "prompt": config.prompt or trained.config.prompt,
        "scienceqa": ScienceqaConfig(image_captions=config.image_captions),
        "max_tokens": 512,
    }
    prefix = SCIENCEQA_ANSWER_PREFIX if config.task == "scienceqa" else ""
    if config.reading == "likelihood":
        # Up to the letter, which ``ask`` takes off again: some tokenizers have a token before it.
        prefix = f"{prefix} A"
    prompts = Collator(tokenizer, transform, **settings, for_generation=True, answer_prefix=prefix)
    letters = letter_ids(tokenizer) if config.reading == "likelihood" else ()
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens or MAX_NEW_TOKENS[config.task],
        min_new_tokens=config.min_new_tokens,
        num_beams=config.num_beams,
    )
    init_process_group(world)
    try:
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16()).to(world.device)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        raise UserError(str(error)) from None

    def ask(rows: Sequence[int]) -> Sequence[Any]:
        samples = [read_sample(index, row) for row in rows]
        batch = prompts(samples)
        if config.reading == "likelihood":
            counts = [len(sample.record["choices"]) for sample in samples]
            return next(likeliest_options(model, [batch.without_last()], letters, counts))
        return next(decode_answers(model, [batch], tokenizer, decoding))

    num_rows = min(len(index), config.max_samples or len(index))
    report = _report(config, trained, index, decoding, num_rows, str(model.dtype).removeprefix("torch."))
    parts = AnswerParts(_output_dir(config), report, world.rank)
    lengths = [1] * num_rows if config.task == "coco" else index.text_lengths[:num_rows].tolist()
    answers = answer_rows(lengths, ask, parts, world, config.batch_size)
    if config.loss:
        targets = Collator(tokenizer, transform, **settings)
        rows = range(world.rank, num_rows, world.size)
        report["loss"] = _mean_loss(model, index, rows, targets, config.batch_size, world)
    if world.is_main:
        write = _write_captions if config.task == "coco" else _write_answers
        write(config, _read_rows(index, num_rows), answers, _Output(_output_dir(config), report), index)
        parts.remove()
    return 0


def _check_rows(config: EvalConfig, index: ShardIndex) -> None:
    without = index.num_without_captions
    if config.task == "coco" and without:
        raise UserError(f"{config.data}: holds rows without captions; --task coco cannot score them")
    if config.task == "scienceqa" and without < len(index):
        raise UserError(f"{config.data}: holds captions, not problems; --task scienceqa cannot score them")
    if config.task == "coco" and config.reading == "likelihood":
        raise UserError("--reading likelihood is ScienceQA's; captions are generated")
    if config.task == "coco" and config.tokenizer == "ptb":
        # Now, not after hours of decoding.
        require_java()


def _report(
    config: EvalConfig,
    trained: TrainedModel,
    index: ShardIndex,
    decoding: Decoding,
    num_rows: int,
    dtype: str,
) -> dict[str, Any]:
    """What the answers depend on; it goes into the metrics, and tells a killed evaluation from another."""
    protocol: dict[str, Any] = {"task": config.task, "split": _split(config), "reading": config.reading}
    if config.task == "coco":
        protocol |= {"prompt": config.prompt or trained.config.prompt}
    else:
        protocol |= {"form": "QCM-A", "image_captions": config.image_captions, "on_parse_failure": "wrong"}
    return {
        "protocol": protocol,
        "decoding": {**to_plain(decoding), "sampling": False, "dtype": dtype},
        "num_samples": num_rows,
        "model": {
            "path": config.model,
            "sha256": trained.fingerprint(),
            "fusion": trained.config.fusion,
            "router": trained.config.router,
        },
        "data": {"path": config.data, "sha256": index.digest},
    }


@dataclass(frozen=True)
class _Output:
    """Where an evaluation is written, and what its metrics begin with."""

    directory: Path
    report: dict[str, Any]

    def write(self, scores: dict[str, Any], lines: Iterable[dict[str, Any]]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        text = json.dumps(scores | self.report, indent=1, ensure_ascii=False)
        (self.directory / "metrics.json").write_text(text, encoding="utf-8")
        print(f"metrics: {self.directory / 'metrics.json'}", flush=True)


def _write_captions(
    config: EvalConfig,
    rows: list[tuple[str, dict[str, Any]]],
    captions: list[str],
    output: _Output,
    index: ShardIndex,
) -> None:
    references = {key: record["captions"] for key, record in rows}
    keys = [key for key, _ in rows]
    predictions = unique_predictions(zip(keys, captions, strict=True))
    found = score_captions(references, predictions, tokenizer=config.tokenizer)
    scores = {name: round(value, 4) for name, value in found.corpus.items()} | {
        "missing": found.missing,
        "comparable": found.comparable,
        "num_empty": found.num_empty,
        "tokenizer": config.tokenizer,
    }
    output.write(
        scores,
        (
            {"key": key, "prediction": text, "references": references[key], "scores": found.each[key]}
            for key, text in zip(keys, captions, strict=True)
        ),
    )
    shown = _spread(len(rows), NUM_EXAMPLES)
    contact_sheet(
        [read_sample(index, i).image or Image.new("RGB", (1, 1), "white") for i in shown],
        [captions[i] for i in shown],
        output.directory / "examples.png",
        references=[references[keys[i]][0] for i in shown],
    )
    print("  ".join(f"{name} {value:.1f}" for name, value in found.corpus.items()))
    for name, reason in found.missing.items():
        print(f"without {name}: {reason}", flush=True)
    if not found.comparable:
        print("tokenizer simple: not comparable with published numbers", flush=True)


def _write_answers(
    config: EvalConfig,
    rows: list[tuple[str, dict[str, Any]]],
    answers: list[Any],
    output: _Output,
    index: ShardIndex,
) -> None:
    problems = [
        scienceqa.problem_of(record, key, has_image=bool(record.get("image"))) for key, record in rows
    ]
    keys = [key for key, _ in rows]
    if config.reading == "likelihood":
        choices = dict(zip(keys, answers, strict=True))
    else:
        choices = scienceqa.read_answers(problems, zip(keys, answers, strict=True))
    found = scienceqa.score(problems, choices)
    scores = {
        "accuracy": {
            name: None if column.percent is None else round(column.percent, 4)
            for name, column in found.columns.items()
        },
        "num_problems": {name: column.num_problems for name, column in found.columns.items()},
        "parse_failure_rate": round(found.parse_failure_percent, 4),
        "num_parse_failures": len(found.parse_failures),
        "num_image_missing": sum(bool(record.get("image_missing")) for _, record in rows),
        "confusion": found.confusion,
        "markdown": scienceqa.markdown_row(Path(config.model).name, found),
        "latex": scienceqa.latex_row(Path(config.model).name, found),
    }
    output.write(
        scores,
        (
            {"key": p.id, "prediction": answer, "choice": choices[p.id], "answer": p.answer}
            for p, answer in zip(problems, answers, strict=True)
        ),
    )
    print(f"{scienceqa.markdown_header()}\n{scores['markdown']}")
    print(f"parse failures: {len(found.parse_failures)} of {len(problems)}", flush=True)


def _read_rows(index: ShardIndex, num_rows: int) -> list[tuple[str, dict[str, Any]]]:
    """Keys and records; one row at a time: the pictures of a whole split would not fit into memory."""
    members = (index.read(row) for row in range(num_rows))
    return [(item["__key__"], parse_record(item)) for item in members]


def _mean_loss(
    model: DehvfForConditionalGeneration,
    index: ShardIndex,
    rows: range,
    collator: Collator,
    batch_size: int,
    world: World,
) -> float:
    """Over every caption of every row, or every problem's answer."""
    samples = (
        read_sample(index, row, caption=caption)
        for row in rows
        for caption in (range(int(index.captions[row])) if index.captions[row] else (None,))
    )
    batches = (collator(group) for group in _groups(samples, batch_size))
    loss_sum, num_tokens = all_reduce_sum(list(map(float, summed_loss(model, batches))), world.device)
    return loss_sum / max(num_tokens, 1.0)


def _split(config: EvalConfig) -> str:
    return config.split or Path(config.data).name


def _output_dir(config: EvalConfig) -> Path:
    return Path(config.output or Path(config.model) / "eval") / f"{config.task}-{_split(config)}"


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
