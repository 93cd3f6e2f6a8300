"""Evaluates a trained model on shards: answers, scores and example pictures.

    python dehvf_ds/eval.py --model RUN_DIR --data SHARDS [--task coco|scienceqa] [--split test]
    python dehvf_ds/eval.py --model RUN_DIR --data ScienceQA --task scienceqa --split test

Under ``deepspeed``, ``torchrun`` or ``srun`` every rank holds a whole model and takes its own rows. A killed
evaluation goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.batch import Sample
from dehvf_ds.config import (
    EvalConfig,
    ScienceqaConfig,
    UserError,
    load_run_config,
    parse_eval_config,
    to_plain,
)
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import read_sample
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import (
    World,
    all_reduce_sum,
    has_fast_bf16,
    init_process_group,
    on_main,
    read_world,
    run_entry,
)
from dehvf_ds.evals.answering import answer_rows
from dehvf_ds.evals.coco_files import is_karpathy, load_references
from dehvf_ds.evals.decode import summed_loss
from dehvf_ds.evals.parts import AnswerParts
from dehvf_ds.evaluation.official import build_official, is_official
from dehvf_ds.evaluation.questions import Questions, build_collator, open_questions
from dehvf_ds.evaluation.scores import (
    Scored,
    draw_examples,
    only_asked,
    score_answer_rows,
    score_caption_rows,
)
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.weights import TrainedModel, find_trained
from dehvf_ds.training.signals import exit_on_request


def main(argv: list[str]) -> int:
    """Runs one evaluation; returns the exit code.

    Raises:
        UserError: anything in the flags or files that the user must mend.
    """
    # Answers are kept as they come, and taken up again.
    exit_on_request()
    config = parse_eval_config(argv)
    world = read_world()
    data = config.data
    if is_official(data):
        init_process_group(world)
        data = str(on_main(world, lambda: build_official(config, _output_dir(config))))
    # Before the model's files: it is the likelier mistake.
    ShardIndex(data)
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
    except ModelError as error:
        raise UserError(str(error)) from None
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    form = {
        "prompt": trained.config.prompt if config.prompt is None else config.prompt,
        "scienceqa": ScienceqaConfig(image_captions=config.image_captions),
    }
    questions = open_questions(
        data,
        config.task,
        tokenizer,
        transform,
        **form,
        reading=config.reading,
        caption_tokenizer=config.tokenizer,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        num_beams=config.num_beams,
        max_samples=config.max_samples,
    )
    references = _load_references(config, questions)
    init_process_group(world)
    try:
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16()).to(world.device)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        raise UserError(str(error)) from None

    report = _report(config, trained, questions, str(model.dtype).removeprefix("torch."))
    parts = AnswerParts(_output_dir(config), report, world.rank)
    lengths = questions.prompt_lengths()
    answers = answer_rows(lengths, lambda rows: questions.ask(model, rows), parts, world, config.batch_size)
    if config.loss:
        targets = build_collator(config.task, tokenizer, transform, **form)
        rows = range(world.rank, questions.num_rows, world.size)
        report["loss"] = _mean_loss(model, questions.index, rows, targets, config.batch_size, world)
    if world.is_main:
        records = questions.records()
        if config.task == "coco":
            scored = score_caption_rows(records, answers, tokenizer=config.tokenizer, references=references)
        else:
            name = Path(config.model).resolve().name
            scored = score_answer_rows(records, answers, reading=config.reading, name=name)
        _write(_output_dir(config), scored, report, questions)
        parts.remove()
    return 0


def _load_references(config: EvalConfig, questions: Questions) -> dict[str, list[str]] | None:
    """The captions of an annotation file, looked at before anything is decoded."""
    if config.references is None:
        return None
    if config.task != "coco":
        raise UserError("--references is of captions; ScienceQA's answers are in its problems")
    path = Path(config.references)
    # COCO's own files hold one split, and name none.
    found = load_references(path, config.split if is_karpathy(path) else None)
    return only_asked(found, [key for key, _ in questions.records()])


def _report(config: EvalConfig, trained: TrainedModel, questions: Questions, dtype: str) -> dict[str, Any]:
    """What the answers depend on; it goes into the metrics, and tells a killed evaluation from another."""
    protocol: dict[str, Any] = {"task": config.task, "split": _split(config), "reading": config.reading}
    if config.task == "coco":
        protocol |= {"prompt": trained.config.prompt if config.prompt is None else config.prompt}
        if config.references is not None:
            digest = hashlib.sha256(Path(config.references).read_bytes()).hexdigest()
            protocol |= {"references": {"path": config.references, "sha256": digest}}
    else:
        protocol |= {"form": "QCM-A", "image_captions": config.image_captions, "on_parse_failure": "wrong"}
    return {
        "protocol": protocol,
        "decoding": {**to_plain(questions.decoding), "sampling": False, "dtype": dtype},
        "num_samples": questions.num_rows,
        "model": {
            "path": config.model,
            "sha256": trained.fingerprint(),
            "fusion": trained.config.fusion,
            "router": trained.config.router,
        },
        "data": {"path": config.data, "sha256": questions.index.digest},
        "seeds": {"training": _training_seed(Path(config.model)), "decoding": None},
    }


def _training_seed(model: Path) -> int | None:
    """The run's; None of an artifact or a merged model that lies elsewhere. Nothing is drawn in decoding."""
    run = next((place for place in (model, model.parent) if (place / "config.yaml").is_file()), None)
    return None if run is None else load_run_config(run / "config.yaml").seed


def _write(directory: Path, scored: Scored, report: dict[str, Any], questions: Questions) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in scored.lines)
    text = json.dumps(scored.metrics | report, indent=1, ensure_ascii=False)
    (directory / "metrics.json").write_text(text, encoding="utf-8")
    draw_examples(questions.index, scored, directory / "examples.png")
    print("\n".join([*scored.summary, f"metrics: {directory / 'metrics.json'}"]), flush=True)


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
        read_sample(index, row, caption=caption, shorter_side=collator.image_size)
        for row in rows
        for caption in (range(int(index.captions[row])) if index.captions[row] else (None,))
    )
    batches = (collator(group) for group in _groups(samples, batch_size))
    loss_sum, num_tokens = all_reduce_sum(list(map(float, summed_loss(model, batches))), world.device)
    return loss_sum / max(num_tokens, 1.0)


def _split(config: EvalConfig) -> str:
    return config.split or Path(config.data).stem


def _output_dir(config: EvalConfig) -> Path:
    return Path(config.output or Path(config.model) / "eval") / f"{config.task}-{_split(config)}"


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


if __name__ == "__main__":
    run_entry(main)
