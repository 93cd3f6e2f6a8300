"""Describes pictures, or answers about them, from the shell.

python dehvf_ds/generate.py --model DIR --image FILE|FOLDER [...] [--prompt TEXT] [--output FILE.jsonl]
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TextIO

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from PIL import Image
from transformers import PreTrainedTokenizerBase, TextStreamer

from dehvf_ds.batch import Sample
from dehvf_ds.config import GenerateConfig, UserError, parse_generate_config
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.images import FORMATS, decode_image
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX
from dehvf_ds.data.text import is_text
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import has_fast_bf16, read_world, run_entry
from dehvf_ds.evals.decode import Answer, Decoding, decode_counted, require_positions
from dehvf_ds.evaluation.writing import json_text
from dehvf_ds.model import ModelError
from dehvf_ds.model.weights import TrainedModel, find_trained

MAX_NEW_TOKENS = {"caption": 40, "scienceqa": 8, "chat": 256}

# Flags that take all that follows them up to the next flag.
_LISTS = ("--image", "--choices")


def main(argv: list[str]) -> int:
    """Prints a line a picture; returns the exit code.

    Raises:
        UserError: no such model or picture, or a question that is not of the model's kind.
    """
    config = parse_flags(argv)
    for flag, texts in (("prompt", [config.prompt]), ("choices", config.choices), ("hint", [config.hint])):
        _require_text(flag, texts)
    paths = list_pictures(config.image) or [None]
    _check_output(config, paths)
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
        record, collator = ask_as_trained(config, trained)
        longest = config.max_new_tokens or MAX_NEW_TOKENS[trained.task or "caption"]
        decoding = Decoding(max_new_tokens=longest, num_beams=config.num_beams)
        prompt = collator([Sample(key="", image=None, record=record)]).input_ids
        require_positions(prompt.shape[1], decoding, trained.config)
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16()).to(read_world().device)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        raise UserError(str(error)) from None
    tokenizer = load_tokenizer(trained.tokenizer_source)
    streamer = _streamer(tokenizer) if config.stream else None
    size = 1 if config.stream else config.batch_size

    start, num_tokens, unreadable = time.perf_counter(), 0, 0
    output = _open_output(config)
    try:
        for number in range(0, len(paths), size):
            shown = paths[number : number + size]
            named = [(path, _read_sample(path, record, collator.image_size)) for path in shown]
            good = [(path, sample) for path, sample in named if isinstance(sample, Sample)]
            bad = [(path, reason) for path, reason in named if isinstance(reason, str)]
            if bad and len(paths) == 1:
                raise UserError(f"--image {bad[0][0]}: {bad[0][1]}")
            for path, reason in bad:
                print(f"warning: {path}: {reason}", file=sys.stderr, flush=True)
                _write(output, {"image": path, "prompt": config.prompt, "error": reason})
            unreadable += len(bad)
            if not good:
                continue
            batch = collator([sample for _, sample in good])
            (answers,) = decode_counted(model, [batch], tokenizer, decoding, streamer)
            num_tokens += sum(answer.num_tokens for answer in answers)
            for (path, _), answer in zip(good, answers, strict=True):
                _tell(config, output, path, answer, alone=len(paths) == 1)
    finally:
        if output is not None and output is not sys.stdout:
            # Every line is flushed: what is left is one that could not be written, which was said.
            with contextlib.suppress(OSError):
                output.close()
    seconds, done = time.perf_counter() - start, len(paths) - unreadable
    print(
        f"{done} answers, {num_tokens} tokens in {seconds:.1f} s "
        f"({done / seconds:.1f} answers/s, {num_tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
    if unreadable:
        raise UserError(f"{unreadable} of {len(paths)} pictures could not be read; the others are answered")
    return 0


def list_pictures(given: Sequence[str]) -> list[str]:
    """Files as they are named; of a folder its pictures and its subfolders', by name. Each is taken once.

    Raises:
        UserError: nothing has that name, or a folder holds no picture.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}

    def is_picture(path: Path) -> bool:
        # What macOS writes beside a file on other file systems has its name, and no picture.
        return path.suffix.lower() in endings and not path.name.startswith("._") and path.is_file()

    paths = []
    for name in given:
        path = Path(name)
        if not name.strip():
            raise UserError("--image is empty; it must be a picture or a folder")
        if path.is_dir():
            inside = sorted(str(p) for p in path.rglob("*") if is_picture(p))
            if not inside:
                raise UserError(f"--image {name}: no pictures in this folder")
            paths += inside
        elif path.is_file():
            paths.append(name)
        elif "://" in name:
            raise UserError(f"--image {name}: an address, not a file; download the picture first")
        else:
            raise UserError(f"--image {name}: No such file or directory")
    once = list({Path(path).absolute(): path for path in reversed(paths)}.values())[::-1]
    if len(once) < len(paths):
        repeated = len(paths) - len(once)
        print(f"note: {repeated} pictures are named more than once and answered once", file=sys.stderr)
    return once


def ask_as_trained(config: GenerateConfig, trained: TrainedModel) -> tuple[dict[str, Any], Collator]:
    """The question in the form that the model was trained with: a record, and what makes a prompt of it.

    Raises:
        UserError: the question is not of the model's kind.
    """
    task, prefix = trained.task or "caption", ""
    record: dict[str, Any] = {}
    if task != "caption" and config.prompt is None:
        raise UserError(f"--prompt: a model of task {task} needs a question")
    if task == "scienceqa":
        if not config.choices:
            raise UserError("--choices: this model was trained on ScienceQA and answers by a choice's letter")
        if len(config.choices) > len(ascii_uppercase) or not all(map(is_text, config.choices)):
            raise UserError(f"--choices: needs 2 to {len(ascii_uppercase)} texts, none of them empty")
        record = {"question": config.prompt, "choices": config.choices, "hint": config.hint or ""}
        prefix = SCIENCEQA_ANSWER_PREFIX
    elif config.choices or config.hint:
        raise UserError(f"--choices and --hint are of ScienceQA; this model was trained for {task}")
    elif task == "chat":
        record = {"conversations": [{"from": "human", "value": config.prompt}]}
    collator = Collator(
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        task=task,  # pyright: ignore[reportArgumentType]
        max_tokens=512,
        prompt=trained.config.prompt if config.prompt is None else config.prompt,
        for_generation=True,
        answer_prefix=prefix,
    )
    return record, collator


def parse_flags(argv: list[str]) -> GenerateConfig:
    """As ``parse_generate_config``; ``--image a b c`` stands for a list, each word as it is.

    Raises:
        UserError: as there.
    """
    words: list[str] = []
    flag = None
    for word in argv:
        name, equals, value = word.partition("=")
        if name in _LISTS:
            flag = name
            words += [f"{flag}+={value}"] if equals else []
        elif word.startswith("--"):
            flag = None
            words.append(word)
        else:
            words.append(word if flag is None else f"{flag}+={word}")
    return parse_generate_config(words)


def _require_text(flag: str, texts: Sequence[str | None]) -> None:
    """Refuses what no tokenizer takes: bytes of the shell's that are no UTF-8."""
    try:
        for text in texts:
            (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"--{flag}: not UTF-8") from None


def _read_sample(path: str | None, record: dict[str, Any], image_size: int) -> Sample | str:
    """A row with its picture; why not, where it cannot be read."""
    if path is None:
        return Sample(key="", image=None, record=record)
    try:
        image = decode_image(Path(path).read_bytes(), shorter_side=image_size)
        return Sample(key=path, image=image, record=record)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def _check_output(config: GenerateConfig, pictures: Sequence[str | None]) -> None:
    if config.output in (None, "-"):
        return
    path = Path(str(config.output))
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file in it")
    if path.exists() and any(name is not None and path.samefile(name) for name in pictures):
        raise UserError(f"--output {path} is one of the pictures; name another file")
    if path.exists() and not config.overwrite:
        raise UserError(f"--output {path} is there already; name another, or pass --overwrite true")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: no such folder {path.absolute().parent}")


def _open_output(config: GenerateConfig) -> TextIO | None:
    if config.output is None:
        return None
    if config.output == "-":
        return sys.stdout
    try:
        return Path(config.output).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {config.output}: {error.strerror or error}") from None


def _tell(
    config: GenerateConfig, output: TextIO | None, path: str | None, answer: Answer, *, alone: bool
) -> None:
    if output is not None:
        line = {"image": path, "prompt": config.prompt, "text": answer.text, "tokens": answer.num_tokens}
        _write(output, line)
    elif not config.stream:
        print(answer.text if alone else f"{_in_one_field(path)}\t{answer.text}", flush=True)


def _in_one_field(path: str | None) -> str:
    return str(path).translate({ord(c): repr(c)[1:-1] for c in "\t\n\r\v\f\x85\u2028\u2029"})


def _write(output: TextIO | None, line: dict[str, Any]) -> None:
    if output is None:
        return
    try:
        output.write(json_text(line) + "\n")
        output.flush()
    except OSError as error:
        raise UserError(f"--output {output.name}: {error.strerror or error}") from None


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    return TextStreamer(tokenizer, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    run_entry(main)
