"""One evaluation from its settings to its metrics, written where the same call finds it again."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from PIL import Image

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import EvalConfig, ScienceqaConfig, UserError, load_run_config, require, to_plain
from dehvf_ds.data.building.sources import describe_file
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import build_prompt
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.distributed import connect_ranks, has_fast_bf16, init_process_group, on_main, read_world
from dehvf_ds.evaluation import dataset, predict
from dehvf_ds.evaluation.coco import CaptionScorer
from dehvf_ds.evaluation.contact_sheet import contact_sheet
from dehvf_ds.evaluation.dataset import TASKS, EvalTask, Prediction, Questions
from dehvf_ds.evaluation.predict import METRICS_NAME, Scored, writing
from dehvf_ds.evaluation.scienceqa import AnswerScorer
from dehvf_ds.model.adapter import TrainedModel, find_trained
from dehvf_ds.training.run_dir import RUN_CONFIG_FILE

PREDICTIONS_NAME = "predictions.jsonl"
NUM_EXAMPLES = 8
MAX_NAME_LENGTH = 80

# What may stand in a directory's name on every file system; all letters and digits of all languages may.
_UNFIT = re.compile(r"[^\w.+=@%() -]")
# JSON takes them as they are, but programs that read line by line end a line there.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

Scorer = CaptionScorer | AnswerScorer


def evaluate(config: EvalConfig) -> None:
    """Runs one evaluation. Every rank must call it; rank 0 writes and prints for all."""
    world = read_world()
    connect_ranks(world)
    data, name = config.data, f"{config.task}-{_directory_name(_split_of(config))}"
    results = Path(config.output) if config.output is not None else Path(config.model) / "eval"
    if dataset.is_published(data):
        data = str(on_main(world, lambda: dataset.published_shards(config, results / "shards" / name)))
    # Before the model's files: it is the likelier mistake.
    ShardIndex(data)
    trained = find_trained(config.model, config.language_model, config.vision_tower)
    notes = require_task(config.task, trained.task, prompt=config.prompt)
    prompt = trained.config.prompt if config.prompt is None else config.prompt
    questions = dataset.open_questions(
        data,
        config.task,
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        prompt=prompt,
        scienceqa=ScienceqaConfig(image_captions=config.image_captions),
        reading=config.reading,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        num_beams=config.num_beams,
        max_samples=config.max_samples,
    )
    questions.require_positions(trained.config)
    init_process_group(world)
    scorers: list[Scorer] = []
    settings = {"tokenizer": config.tokenizer, "references": config.references, "split": config.split}
    settings |= {"name": Path(config.model).resolve().name, "image_captions": config.image_captions}
    on_main(world, lambda: scorers.append(open_scorer(questions, **settings)))
    model = trained.load(config.dtype, fast_bf16=has_fast_bf16(), device=world.device)
    dtype = str(model.dtype).removeprefix("torch.")

    def claim() -> tuple[dict[str, Any], Path, list[str]]:
        report = _report(config, trained, questions, prompt, dtype)
        return report, *predict.claim_directory(results, name, report)

    report, directory, more = on_main(world, claim)
    for line in [*notes, *(f"note: {note}" for note in more)] if world.is_main else ():
        print(line, file=sys.stderr, flush=True)
    cache = predict.PredictionCache(directory, predict.terms_of(report), world.rank)
    lengths = questions.prompt_lengths()
    predictions = predict.predict_rows(
        lengths, lambda rows: questions.ask(model, rows), cache, world, config.batch_size
    )
    if config.loss:
        report |= predict.measure_loss(model, questions, config.batch_size, world)
    for scorer in scorers:
        finish(directory, scorer, predictions, report, questions.index)
        cache.remove()


def require_task(task: EvalTask, trained_for: str | None, *, prompt: str | None) -> list[str]:
    """Refuses a model that was trained for the other task, where its ``task`` says so.

    Returns a line for the user where the question has another form than in training.
    """
    if trained_for is None or TASKS.get(trained_for) == task:
        return []
    told = f"the model was trained for {trained_for}, and --task {task} asks for something else"
    if trained_for in TASKS and prompt is None:
        raise UserError(
            f"{told}; pass --task {TASKS[trained_for]} and data of that kind, or name another model"
        )
    return [f"warning: {told}; the question is put in a form that it has not seen in training"]


def _report(
    config: EvalConfig, trained: TrainedModel, questions: Questions, prompt: str | None, dtype: str
) -> dict[str, Any]:
    """What the predictions depend on, for the metrics; tells a killed evaluation from another."""
    protocol: dict[str, Any] = {"task": config.task, "split": _split_of(config), "reading": config.reading}
    if config.task == "coco":
        protocol |= {"prompt": build_prompt({}, "caption", prompt=prompt), "tokenizer": config.tokenizer}
        if config.references is not None:
            protocol |= {"references": describe_file(Path(config.references))}
    else:
        protocol |= {"form": "QCM-A", "image_captions": config.image_captions, "on_parse_failure": "wrong"}
    model = Path(config.model)
    files = [path for path in (model / RUN_CONFIG_FILE, model.parent / RUN_CONFIG_FILE) if path.is_file()]
    return {
        "protocol": protocol,
        "decoding": {**to_plain(questions.decoding), "sampling": False, "dtype": dtype},
        "num_samples": questions.num_rows,
        "model": {
            "path": str(model.absolute()),
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
        # Nothing is drawn in decoding; artifacts and merged models that lie elsewhere know of no run.
        "seeds": {"training": load_run_config(files[0]).seed if files else None, "decoding": None},
    }


def _split_of(config: EvalConfig) -> str:
    """The split's name: the user's, or the last part of where the data really lie, without ``.json``."""
    if config.split is not None:
        return config.split
    name = Path(config.data).resolve().name
    return name.removesuffix(".json") if Path(config.data).is_file() else name


def _directory_name(split: str) -> str:
    return _UNFIT.sub("_", split)[:MAX_NAME_LENGTH].strip() or "data"


# --- scores, and what is written ---


def open_scorer(
    questions: Questions,
    *,
    name: str,
    tokenizer: Literal["ptb", "simple"] = "ptb",
    references: str | None = None,
    split: str | None = None,
    image_captions: bool = False,
) -> Scorer:
    """Reads the records of all rows that are asked, and finds before decoding what would keep them unscored.

    ``name`` is of the row in ScienceQA's table; ``references`` a file of captions, its part ``split``;
    ``image_captions`` whether problems are asked with their pictures' captions.
    """
    records = questions.records
    if twice := [key for key, count in Counter(key for key, _ in records).items() if count > 1]:
        told = f"{len(twice)} keys stand more than once, {twice[0]} the first"
        raise UserError(f"{told}; build the shards again")
    if questions.task == "coco":
        found = None if references is None else dataset.load_references(Path(references), split)
        return CaptionScorer(records, tokenizer=tokenizer, references=found)
    with_picture = [record for _, record in records if record.get("image")]
    require(
        not image_captions or not with_picture or any(r.get("image_caption") for r in with_picture),
        f"--image_captions: the problems of {questions.index.directory} have no captions of their pictures; "
        "build the shards with --captions captions.json",
    )
    return AnswerScorer(records, name=name)


def score(
    scorer: Scorer, predictions: Sequence[Prediction], path: Path
) -> tuple[Scored, list[dict[str, Any]]]:
    """Scores one prediction a row, and writes a line of each into ``path``; returns both.

    The lines are written without scores first, since predictions cost the most. A picture that could not be
    read counts as an empty answer, and is told.
    """
    texts = [None if isinstance(said, dict) else said for said in predictions]
    lines = [
        line | (said if isinstance(said, dict) else {})
        for line, said in zip(scorer.lines(texts), predictions, strict=True)
    ]
    write_lines(path, lines)
    pairs = zip(scorer.keys, predictions, strict=True)
    unreadable = {key: said["unreadable"] for key, said in pairs if isinstance(said, dict)}
    reason = next(iter(unreadable.values()), "")
    require(len(unreadable) < len(lines), f"none of the {len(lines)} rows could be read: {reason}")
    found = scorer.score(texts)
    metrics = found.metrics | {"num_unreadable": len(unreadable), "unreadable": unreadable}
    numbers, summary = found.numbers, found.summary
    if unreadable:
        numbers = numbers | {"num_unreadable": float(len(unreadable))}
        named = ", ".join([*list(unreadable)[:3], *["..."] * (len(unreadable) > 3)])
        told = f"{len(unreadable)} of {len(lines)} pictures could not be read and count as empty answers"
        summary = [*summary, f"warning: {told}: {named} ({reason})"]
    for line, scores in zip(lines, found.scores, strict=True):
        line.update({"scores": scores} if scores else {})
    write_lines(path, lines)
    return replace(found, metrics=metrics, numbers=numbers, summary=summary), lines


def finish(
    directory: Path,
    scorer: Scorer,
    predictions: Sequence[Prediction],
    report: Mapping[str, Any],
    index: ShardIndex,
) -> None:
    """Scores, writes and tells; examples may fail alone."""
    path = directory / PREDICTIONS_NAME
    try:
        scored, lines = score(scorer, predictions, path)
    except UserError as error:
        raise UserError(
            f"{error}; the answers are kept in {path}, and the same command scores them"
        ) from None
    with writing(directory / METRICS_NAME), atomic_file(directory / METRICS_NAME) as part:
        part.write_text(json_text(scored.metrics | dict(report), indent=1), encoding="utf-8")
    notes, sheet = [], directory / "examples.png"
    if reason := try_examples(index, lines, sheet):
        notes.append(f"without {sheet.name}: {reason}")
    if "loss_reason" in report:
        notes.append(f"without loss: {report['loss_reason']}")
    print("\n".join([*scored.summary, *notes, f"metrics: {directory / METRICS_NAME}"]), flush=True)


def try_examples(index: ShardIndex, lines: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    """Draws some rows, evenly spread: picture, answer, reference; where that fails, why, in one line."""
    count = min(NUM_EXAMPLES, len(lines))
    rows = [i * len(lines) // count for i in range(count)]
    pictures, said, truths = [], [], []
    try:
        for row in rows:
            line, image = lines[row], None
            with contextlib.suppress(DamagedSample):
                image = read_sample(index, row).image
            pictures.append(image or Image.new("RGB", (1, 1), "white"))
            said.append("(picture not readable)" if "unreadable" in line else _shown(line["prediction"]))
            truths.append(line["references"][0] if "references" in line else _shown(line["answer"]))
        contact_sheet(pictures, said, path, references=truths)
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _shown(answer: str | int | None) -> str:
    return ascii_uppercase[answer] if isinstance(answer, int) else str(answer)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: letters as they are, but where a text has half a surrogate pair.

    Without ``indent`` it is one line, whatever a reader takes for the end of one.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line; the file gets its name when it is whole."""
    with writing(path), atomic_file(path) as part:
        part.write_text("".join(json_text(line) + "\n" for line in lines), encoding="utf-8")
