"""Evaluates a trained model on shards: answers, scores and example pictures.

    python dehvf_ds/eval.py --model RUN_DIR --data SHARDS [--task coco|scienceqa] [--split test]
    python dehvf_ds/eval.py --model RUN_DIR --data ScienceQA --task scienceqa --split test

Under ``deepspeed``, ``torchrun`` or ``srun`` every rank holds a whole model and takes its own rows. A killed
evaluation goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.config import (
    EvalConfig,
    ScienceqaConfig,
    UserError,
    load_run_config,
    parse_eval_config,
    to_plain,
)
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import build_prompt
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import has_fast_bf16, init_process_group, meet, on_main, read_world, run_entry
from dehvf_ds.evals.answering import answer_rows
from dehvf_ds.evals.parts import AnswerParts
from dehvf_ds.evaluation.loss import measure_loss
from dehvf_ds.evaluation.official import build_official, is_official
from dehvf_ds.evaluation.place import (
    claim_directory,
    evaluation_name,
    results_directory,
    split_of,
    terms_of,
)
from dehvf_ds.evaluation.questions import (
    Questions,
    build_collator,
    open_questions,
    require_image_captions,
    require_task,
)
from dehvf_ds.evaluation.scores import AnswerScorer, CaptionScorer, open_scorer
from dehvf_ds.evaluation.writing import PREDICTIONS_NAME, write_lines, write_results
from dehvf_ds.model import ModelError
from dehvf_ds.model.weights import TrainedModel, find_trained
from dehvf_ds.training.stop import exit_on_request


def main(argv: list[str]) -> int:
    """Runs one evaluation; returns the exit code.

    Raises:
        UserError: anything in the flags or files that the user must mend.
    """
    # Answers are kept as they come, and taken up again.
    exit_on_request()
    config = parse_eval_config(argv)
    if config.references is not None and config.task != "coco":
        raise UserError("--references is of captions; ScienceQA's answers are in its problems")
    if config.image_captions and config.task != "scienceqa":
        raise UserError(
            "--image_captions is of ScienceQA, whose problems may have captions of their pictures"
        )
    if config.images is not None and not Path(config.data).is_file():
        raise UserError(
            f"--images is of annotation files; {config.data} is a directory, with its pictures in it"
        )
    world = read_world()
    meet(world)
    data = config.data
    if is_official(data):
        data = str(on_main(world, lambda: build_official(config)))
    # Before the model's files: it is the likelier mistake.
    ShardIndex(data)
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
    except ModelError as error:
        raise UserError(str(error)) from None
    warning = require_task(config.task, trained.task, prompt=config.prompt)
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
    questions.require_positions(trained.config)
    init_process_group(world)
    scorer: CaptionScorer | AnswerScorer | None = None

    def open_it() -> None:
        nonlocal scorer
        scorer = _open_scorer(config, questions)

    on_main(world, open_it)
    try:
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16(), device=world.device)
    except ModelError as error:
        raise UserError(str(error)) from None

    dtype = str(model.dtype).removeprefix("torch.")

    def claim() -> tuple[dict[str, Any], Path, list[str]]:
        report = _report(config, trained, questions, dtype)
        name = evaluation_name(config.task, split_of(config))
        return report, *claim_directory(results_directory(config), name, report)

    report, directory, notes = on_main(world, claim)
    if world.is_main:
        for line in ([warning] if warning else []) + [f"note: {note}" for note in notes]:
            print(line, file=sys.stderr, flush=True)
    parts = AnswerParts(directory, terms_of(report), world.rank)
    lengths = questions.prompt_lengths()
    answers = answer_rows(lengths, lambda rows: questions.ask(model, rows), parts, world, config.batch_size)
    if config.loss:
        targets = build_collator(config.task, tokenizer, transform, **form)
        report |= measure_loss(model, questions, targets, config.batch_size, world)
    if scorer is not None:
        _finish(directory, scorer, answers, report, questions)
        parts.remove()
    return 0


def _open_scorer(config: EvalConfig, questions: Questions) -> CaptionScorer | AnswerScorer:
    """All that can be looked at before anything is decoded."""
    scorer = open_scorer(
        questions,
        name=Path(config.model).resolve().name,
        tokenizer=config.tokenizer,
        references=config.references,
        split=config.split,
    )
    if config.image_captions:
        require_image_captions(config.data, questions)
    return scorer


def _report(config: EvalConfig, trained: TrainedModel, questions: Questions, dtype: str) -> dict[str, Any]:
    """What the answers depend on; it goes into the metrics, and tells a killed evaluation from another."""
    protocol: dict[str, Any] = {
        "task": config.task,
        "split": split_of(config),
        "reading": config.reading,
    }
    if config.task == "coco":
        prompt = trained.config.prompt if config.prompt is None else config.prompt
        protocol |= {"prompt": build_prompt({}, "caption", prompt=prompt), "tokenizer": config.tokenizer}
        if config.references is not None:
            digest = hashlib.sha256(Path(config.references).read_bytes()).hexdigest()
            protocol |= {"references": {"name": Path(config.references).name, "sha256": digest}}
    else:
        protocol |= {"form": "QCM-A", "image_captions": config.image_captions, "on_parse_failure": "wrong"}
    return {
        "protocol": protocol,
        "decoding": {**to_plain(questions.decoding), "sampling": False, "dtype": dtype},
        "num_samples": questions.num_rows,
        "model": {
            "path": str(Path(config.model).absolute()),
            "sha256": trained.fingerprint(),
            "task": trained.task,
            "fusion": trained.config.fusion,
            "router": trained.config.router,
        },
        "data": {
            "path": str(Path(config.data).absolute()),
            "images": None if config.images is None else str(Path(config.images).absolute()),
            "sha256": questions.index.digest,
        },
        "seeds": {"training": _training_seed(Path(config.model)), "decoding": None},
    }


def _training_seed(model: Path) -> int | None:
    """The run's; None of an artifact or a merged model that lies elsewhere. Nothing is drawn in decoding."""
    run = next((place for place in (model, model.parent) if (place / "config.yaml").is_file()), None)
    return None if run is None else load_run_config(run / "config.yaml").seed


def _finish(
    directory: Path,
    scorer: CaptionScorer | AnswerScorer,
    answers: list[Any],
    report: dict[str, Any],
    questions: Questions,
) -> None:
    """Scores and writes; the answers first, which cost the most."""
    write_lines(directory / PREDICTIONS_NAME, scorer.lines(answers))
    try:
        scored = scorer.score(answers)
    except UserError as error:
        kept = f"the answers are kept in {directory / PREDICTIONS_NAME}, and the same command scores them"
        raise UserError(f"{error}; {kept}") from None
    notes = write_results(directory, scored, report, questions.index)
    if "loss_reason" in report:
        notes.append(f"without loss: {report['loss_reason']}")
    print("\n".join([*scored.summary, *notes, f"metrics: {directory / 'metrics.json'}"]), flush=True)


if __name__ == "__main__":
    run_entry(main, meets=True)
