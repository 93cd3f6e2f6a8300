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
from typing import Any, Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import EvalConfig, ScienceqaConfig, UserError, load_run_config, require, to_plain
from dehvf_ds.data.building.sources import describe_file
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import TextTask, build_prompt
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.distributed import connect_ranks, has_fast_bf16, init_process_group, on_main, read_world
from dehvf_ds.evaluation import dataset, predict
from dehvf_ds.evaluation.coco import CaptionScorer
from dehvf_ds.evaluation.dataset import Prediction, Questions
from dehvf_ds.evaluation.predict import METRICS_NAME, Scored, writing
from dehvf_ds.evaluation.scienceqa import AnswerScorer
from dehvf_ds.model.adapter import TrainedModel, find_trained
from dehvf_ds.training.run_dir import RUN_CONFIG_FILE

PREDICTIONS_NAME = "predictions.jsonl"
MAX_NAME_LENGTH = 80

NUM_EXAMPLES = 8
EXAMPLES_A_ROW = 4
PICTURE_SIDE = 224
GAP = 20
LINE_HEIGHT = 20
PAPER, INK, FAINT, FRAME = "#ffffff", "#18181b", "#71717a", "#d4d4d8"

# Characters that some file system does not take in a directory's name.
_UNFIT = re.compile(r"[^\w.+=@%() -]")
# JSON takes them as they are, but programs that read line by line end a line there.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

Scorer = CaptionScorer | AnswerScorer


def evaluate(config: EvalConfig) -> None:
    """Runs one evaluation. Every rank must call it; rank 0 writes and prints for all."""
    world = read_world()
    connect_ranks(world)
    data, split = config.data, _UNFIT.sub("_", _split_of(config))[:MAX_NAME_LENGTH].strip()
    name = f"{config.task}-{split or 'data'}"
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


def require_task(task: TextTask, trained_for: str | None, *, prompt: str | None) -> list[str]:
    """Refuses a model that was trained for the other task.

    Returns a warning for the user if the model has not seen this form of question in training.
    """
    if trained_for in (None, task):
        return []
    differs = f"the model was trained for {trained_for}, and --task {task} asks for something else"
    if trained_for in get_args(TextTask) and prompt is None:
        raise UserError(f"{differs}; pass --task {trained_for} and data of that kind, or name another model")
    return [f"warning: {differs}; it has not seen this form of question in training"]


def _report(
    config: EvalConfig, trained: TrainedModel, questions: Questions, prompt: str | None, dtype: str
) -> dict[str, Any]:
    """What the predictions depend on, for the metrics; it identifies a killed evaluation."""
    protocol: dict[str, Any] = {"task": config.task, "split": _split_of(config), "reading": config.reading}
    if config.task == "caption":
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
        # Decoding draws nothing; an artifact or merged model outside a run has no seed of training.
        "seeds": {"training": load_run_config(files[0]).seed if files else None, "decoding": None},
    }


def _split_of(config: EvalConfig) -> str:
    """The split's name: the user's, or the last part of the data's resolved path, without ``.json``."""
    if config.split is not None:
        return config.split
    name = Path(config.data).resolve().name
    return name.removesuffix(".json") if Path(config.data).is_file() else name


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
    """Reads the records of all rows, and refuses before decoding what could not be scored after it.

    ``name`` begins the row of ScienceQA's table; ``references`` is a file of captions, of which ``split`` is
    read; ``image_captions`` says whether the problems are asked with their pictures' captions.
    """
    records = questions.records
    if repeated := [key for key, count in Counter(key for key, _ in records).items() if count > 1]:
        counted = f"{len(repeated)} keys occur more than once, {repeated[0]} the first"
        raise UserError(f"{counted}; build the shards again")
    if questions.task == "caption":
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
    """Scores one prediction per row, and writes a line for each into ``path``; returns both.

    The lines are first written without scores, so that a failing metric loses no prediction. A picture that
    could not be read counts as an empty answer, with a warning.
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
        counted = f"{len(unreadable)} of {len(lines)} pictures could not be read and count as empty answers"
        summary = [*summary, f"warning: {counted}: {named} ({reason})"]
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
    """Scores the predictions, writes the results and prints a summary."""
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


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can encode: escaped only if a text holds a lone surrogate.

    Without ``indent`` it is one line, whatever a reader takes for the end of one.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line."""
    with writing(path), atomic_file(path) as part:
        part.write_text("".join(json_text(line) + "\n" for line in lines), encoding="utf-8")


# --- example pictures ---


def try_examples(index: ShardIndex, lines: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    """Draws evenly spread rows: picture, answer, reference; returns in one line why that failed."""
    count = min(NUM_EXAMPLES, len(lines))
    cells = []
    try:
        for row in (i * len(lines) // count for i in range(count)):
            line, image = lines[row], None
            with contextlib.suppress(DamagedSample):
                image = read_sample(index, row).image
            said = "(picture not readable)" if "unreadable" in line else _shown(line["prediction"])
            truth = line["references"][0] if "references" in line else _shown(line["answer"])
            cells.append((image or Image.new("RGB", (1, 1), PAPER), said, truth))
        contact_sheet(cells, path)
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _shown(answer: str | int | None) -> str:
    return ascii_uppercase[answer] if isinstance(answer, int) else str(answer)


def contact_sheet(cells: Sequence[tuple[Image.Image, str, str]], path: Path) -> None:
    """Writes a PNG of RGB pictures, each above its answer and, in grey, its reference; no text is cut."""
    font = ImageFont.load_default(size=15)
    drawn = []
    for picture, *texts in cells:
        # A blank line between the two.
        answer, reference = (_wrap(text, font, PICTURE_SIDE) for text in texts)
        colored = [(line, INK) for line in [*answer, ""]] + [(line, FAINT) for line in reference]
        cell = Image.new(
            "RGB", (PICTURE_SIDE + GAP, PICTURE_SIDE + 2 * GAP + LINE_HEIGHT * len(colored)), PAPER
        )
        draw = ImageDraw.Draw(cell)
        scale = PICTURE_SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
        cell.paste(fitted, ((PICTURE_SIDE - width) // 2, (PICTURE_SIDE - height) // 2))
        # It shows where a white picture ends.
        draw.rectangle((0, 0, PICTURE_SIDE - 1, PICTURE_SIDE - 1), outline=FRAME)
        for number, (line, color) in enumerate(colored):
            draw.text((0, PICTURE_SIDE + GAP // 2 + LINE_HEIGHT * number), line, fill=color, font=font)
        drawn.append(cell)
    rows = [drawn[start : start + EXAMPLES_A_ROW] for start in range(0, len(drawn), EXAMPLES_A_ROW)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (GAP + len(rows[0]) * (PICTURE_SIDE + GAP), GAP + sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * cell.width, GAP + sum(heights[:number])))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels, broken at white space, or inside a word that is too long."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
