"""Captions of pictures, or answers about them, asked in the form that the model was trained with."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TextIO, cast

from PIL import Image
from transformers import TextStreamer

from dehvf_ds.batch import Sample
from dehvf_ds.config import GenerateConfig, UserError, require
from dehvf_ds.data.collate import Collator, build_image_transform, load_tokenizer
from dehvf_ds.data.images import FORMATS, decode_image
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX, Task
from dehvf_ds.data.text import is_text
from dehvf_ds.distributed import has_fast_bf16, read_world
from dehvf_ds.evaluation.decode import MAX_NEW_TOKENS, Decoding, decode, require_positions
from dehvf_ds.evaluation.evaluate import json_text
from dehvf_ds.evaluation.predict import in_batches
from dehvf_ds.model.adapter import TrainedModel, find_trained

# Characters that end a field or a line of the console's output, escaped.
_FIELD_ENDS = {ord(c): repr(c)[1:-1] for c in "\t\n\r\v\f\x85\u2028\u2029"}


def generate(config: GenerateConfig) -> None:
    """Prints or writes a line for each picture; one that cannot be read does not stop the others."""
    for flag, texts in (("prompt", [config.prompt]), ("choices", config.choices), ("hint", [config.hint])):
        # The shell's bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes.
        is_utf8 = all(not 0xD800 <= ord(c) < 0xE000 for text in texts for c in text or "")
        require(is_utf8, f"--{flag}: not UTF-8")
    paths: list[str | None] = [*list_pictures(config.image)] or [None]
    _check_output(config, paths)
    trained = find_trained(config.model, config.language_model, config.vision_tower)
    record, collator = ask_as_trained(config, trained)
    longest = config.max_new_tokens or MAX_NEW_TOKENS[trained.task or "caption"]
    decoding = Decoding(max_new_tokens=longest, num_beams=config.num_beams)
    prompt = collator([Sample(key="", image=None, record=record)]).input_ids
    require_positions(prompt.shape[1], decoding, trained.config)
    model = trained.load(config.dtype, fast_bf16=has_fast_bf16(), device=read_world().device)
    tokenizer = load_tokenizer(trained.tokenizer_source)
    streamer = None
    if config.stream:
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
    start = time.perf_counter()
    num_tokens = unreadable = 0
    with _opened(config) as output:
        for group in in_batches(paths, 1 if config.stream else config.batch_size):
            read = [(path, read_picture(path, record, collator.image_size)) for path in group]
            good = [(path, sample) for path, sample in read if isinstance(sample, Sample)]
            for path, reason in read:
                if isinstance(reason, str):
                    unreadable += 1
                    require(len(paths) > 1, f"--image {path}: {reason}")
                    print(f"warning: {path}: {reason}", file=sys.stderr, flush=True)
                    _write(output, {"image": path, "prompt": config.prompt, "error": reason})
            batch = collator([sample for _, sample in good]) if good else None
            answers = decode(model, batch, tokenizer, decoding, streamer) if batch else []
            for (path, _), (text, count) in zip(good, answers, strict=True):
                num_tokens += count
                _write(output, {"image": path, "prompt": config.prompt, "text": text, "tokens": count})
                if output is None and not config.stream:
                    field = "" if len(paths) == 1 else f"{str(path).translate(_FIELD_ENDS)}\t"
                    print(f"{field}{text}", flush=True)
    seconds, done = time.perf_counter() - start, len(paths) - unreadable
    print(
        f"{done} answers, {num_tokens} tokens in {seconds:.1f} s "
        f"({done / seconds:.1f} answers/s, {num_tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
    failed = f"{unreadable} of {len(paths)} pictures could not be read; the others are answered"
    require(not unreadable, failed)


def list_pictures(names: Sequence[str]) -> list[str]:
    """Files as they are named, and all pictures below a folder, sorted; each once."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths = []
    for name in names:
        path, found = Path(name), [name]
        if path.is_dir():
            # macOS writes files of that name, which hold no picture, on other systems' disks.
            inside = (p for p in path.rglob("*") if p.suffix.lower() in endings and p.name[:2] != "._")
            found = sorted(str(p) for p in inside if p.is_file())
            require(bool(found), f"--image {name}: no pictures in this folder")
        require(path.exists(), f"--image {name}: No such file or directory")
        paths += found
    once = list({Path(path).absolute(): path for path in reversed(paths)}.values())[::-1]
    if repeated := len(paths) - len(once):
        print(f"note: {repeated} pictures are named more than once and answered once", file=sys.stderr)
    return once


def ask_as_trained(config: GenerateConfig, trained: TrainedModel) -> tuple[dict[str, Any], Collator]:
    """The question in the form of the model's training: a record, and what makes a prompt from it."""
    task = trained.task or "caption"
    record: dict[str, Any] = {}
    has_question = task == "caption" or config.prompt is not None
    require(has_question, f"--prompt: a model of task {task} needs a question")
    if task == "scienceqa":
        enough = 2 <= len(config.choices) <= len(ascii_uppercase) and all(map(is_text, config.choices))
        needed = f"answers with a choice's letter; name 2 to {len(ascii_uppercase)} texts, none of them empty"
        require(enough, f"--choices: this model was trained on ScienceQA and {needed}")
        record = {"question": config.prompt, "choices": config.choices, "hint": config.hint or ""}
    else:
        unfit = f"--choices and --hint are for ScienceQA; this model was trained for {task}"
        require(not config.choices and not config.hint, unfit)
        if task == "chat":
            record = {"conversations": [{"from": "human", "value": config.prompt}]}
    return record, prompt_collator(trained, config.prompt)


def prompt_collator(trained: TrainedModel, prompt: str | None = None) -> Collator:
    """Makes prompts in the form of the model's training, or with another instruction for captions."""
    task = cast(Task, trained.task or "caption")
    return Collator(
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        task=task,
        max_tokens=512,
        prompt=trained.config.prompt if prompt is None else prompt,
        for_generation=True,
        answer_prefix=SCIENCEQA_ANSWER_PREFIX if task == "scienceqa" else "",
    )


def read_picture(path: str | None, record: dict[str, Any], image_size: int) -> Sample | str:
    """A row with its picture, if a path is given; or why the picture cannot be read."""
    try:
        image = None if path is None else decode_image(Path(path).read_bytes(), shorter_side=image_size)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return Sample(key=path or "", image=image, record=record)


def _check_output(config: GenerateConfig, pictures: Sequence[str | None]) -> None:
    if config.output in (None, "-"):
        return
    path = Path(str(config.output))
    folder = path.absolute().parent
    fits = folder.is_dir() and not path.is_dir()
    require(fits, f"--output {path}: no such folder {folder}, or a folder itself")
    if path.exists():
        is_picture = any(name is not None and path.samefile(name) for name in pictures)
        require(not is_picture, f"--output {path} is one of the pictures; name another file")
        require(config.overwrite, f"--output {path} exists; name another, or pass --overwrite true")


def _opened(config: GenerateConfig) -> AbstractContextManager[TextIO | None]:
    if config.output in (None, "-"):
        return nullcontext(sys.stdout if config.output else None)
    return Path(config.output).open("w", encoding="utf-8")


def _write(output: TextIO | None, line: dict[str, Any]) -> None:
    if output is None:
        return
    try:
        output.write(json_text(line) + "\n")
        output.flush()
    except OSError as error:
        if output is sys.stdout:
            raise
        raise UserError(f"--output {output.name}: {error.strerror or error}") from None
