"""What an evaluation reads: rows of shards as questions, published layouts, reference captions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Sample
from dehvf_ds.config import EvalConfig, ScienceqaConfig, UserError, require
from dehvf_ds.data.building.scan import BadRows
from dehvf_ds.data.building.sources import SourceRow, read_layout
from dehvf_ds.data.building.writer import BuildSettings, build_shards
from dehvf_ds.data.collate import Collator, ImageTransform, letter_ids
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX, TextTask
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.evaluation.decode import MAX_NEW_TOKENS, Decoding, decode, likeliest_options, require_positions
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

Reading = Literal["generation", "likelihood"]

Unreadable = dict[Literal["unreadable"], str]
"""Why a row's picture cannot be read, in place of an answer."""

Prediction = str | int | Unreadable | None
"""A text, or the number of the likeliest option (None if its logit is NaN)."""

# What follows the last dot of another name belongs to it: "3.5 mm".
_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"}


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The rows of an evaluation, opened."""

    task: TextTask
    index: ShardIndex
    num_rows: int
    """of the index, from the first"""
    collator: Collator
    """makes prompts"""
    targets: Collator
    """makes rows for the loss"""
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    letters: tuple[int, ...] = ()
    """each option's token if the likeliest option is the answer; empty if answers are generated"""

    def ask(self, model: DehvfForConditionalGeneration, rows: Sequence[int]) -> list[Prediction]:
        """Answers some rows in one batch; a shard that cannot be read is an error."""
        decoded: dict[bytes, Image.Image] = {}
        samples = [self._read(row, decoded) for row in rows]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        answers = iter(self._answer(model, good) if good else [])
        return [next(answers) if isinstance(sample, Sample) else sample for sample in samples]

    def _read(self, row: int, decoded: dict[bytes, Image.Image]) -> Sample | Unreadable:
        try:
            return read_sample(self.index, row, shorter_side=self.collator.image_size, decoded=decoded)
        except DamagedSample as error:
            # A damaged picture is no error here; a shard that cannot be read raises again.
            self.index.read(row)
            return {"unreadable": " ".join(str(error).split())}

    def _answer(
        self, model: DehvfForConditionalGeneration, samples: Sequence[Sample]
    ) -> Sequence[Prediction]:
        batch = self.collator(samples)
        if self.letters:
            counts = [len(sample.record["choices"]) for sample in samples]
            return likeliest_options(model, batch.without_last(), self.letters, counts)
        return [answer.text for answer in decode(model, batch, self.tokenizer, self.decoding)]

    def require_positions(self, model_config: DehvfConfig) -> None:
        """Refuses answers that may run past the decoder's last position after the longest prompt."""
        lengths = self.prompt_lengths()
        _, record = self._record(lengths.index(max(lengths)))
        prompt = self.collator([Sample(key="", image=None, record=record)]).input_ids
        require_positions(prompt.shape[1], self.decoding, model_config)

    def prompt_lengths(self) -> list[int]:
        """Of each row, in characters; 1 for captions, whose prompts are all the same."""
        if self.task == "caption":
            return [1] * self.num_rows
        return self.index.text_lengths[: self.num_rows].tolist()

    @cached_property
    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """Keys and records; rows are read one at a time, since all pictures would not fit into memory."""
        return [self._record(row) for row in range(self.num_rows)]

    def _record(self, row: int) -> tuple[str, dict[str, Any]]:
        members = self.index.read(row)
        return members["__key__"], read_record(members).record


def open_questions(
    data: str,
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    *,
    prompt: str | None,
    scienceqa: ScienceqaConfig,
    reading: Reading = "generation",
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    max_samples: int | None = None,
) -> Questions:
    """Opens shards for an evaluation, and checks now what would otherwise fail after hours of decoding.

    ``prompt`` applies to captions, ``scienceqa`` and ``reading`` to problems. None takes the task's longest
    answer and all rows.
    """
    longest = max_new_tokens or MAX_NEW_TOKENS[task]
    too_short = f"--min_new_tokens {min_new_tokens} is more than the longest answer, {longest} tokens"
    require(min_new_tokens <= longest, too_short)
    index = ShardIndex(data)
    is_caption = task == "caption"
    held, other = ("rows without captions", "scienceqa") if is_caption else ("captions", "caption")
    unfit = f"{data}: holds {held}, which --task {task} cannot score; they need --task {other}"
    require(index.num_without_captions == (0 if is_caption else len(index)), unfit)
    index.check_task(task, "--task")
    prefix = "" if is_caption else SCIENCEQA_ANSWER_PREFIX
    if reading == "likelihood":
        # With the letter, which ``ask`` removes again: some tokenizers put a token before it.
        prefix = f"{prefix} A"
    form: dict[str, Any] = {"task": task, "prompt": prompt, "scienceqa": scienceqa, "max_tokens": 512}
    return Questions(
        task=task,
        index=index,
        num_rows=min(len(index), max_samples or len(index)),
        collator=Collator(tokenizer, transform, **form, for_generation=True, answer_prefix=prefix),
        targets=Collator(tokenizer, transform, **form),
        tokenizer=tokenizer,
        decoding=Decoding(max_new_tokens=longest, min_new_tokens=min_new_tokens, num_beams=num_beams),
        letters=tuple(letter_ids(tokenizer)) if reading == "likelihood" else (),
    )


# --- published files ---


def is_published(data: str) -> bool:
    """Whether ``data`` is a ScienceQA directory or a JSON file of captions, and not a directory of shards."""
    return data.lower().endswith(".json") or (Path(data) / "problems.json").is_file()


def published_shards(config: EvalConfig, output: Path) -> Path:
    """Builds shards of published files, or finds them built of the same ones. Rank 0 alone.

    ``config.data`` is a directory with ``problems.json`` and ``pid_splits.json``, COCO's ``captions_*.json``
    or Karpathy's ``dataset_*.json``. A digest of files, split and pictures is added to the name ``output``.
    """
    data = Path(config.data)
    pictures = data if data.is_dir() else Path(config.images or data.parent)
    rows, facts = _read_published(data, pictures, config.split)
    contents = [file["sha256"] for file in facts.values() if isinstance(file, dict)]
    terms = {"contents": contents, "split": config.split, "pictures": str(pictures.resolve())}
    shards = output.with_name(f"{output.name}-{digest_of(terms)[:8]}")
    build_shards(
        rows,
        shards,
        name=config.task,
        settings=BuildSettings(),
        facts=facts,
        num_workers=1,
        # Scores of fewer rows would not be those of the published split.
        bad=BadRows(skip=False, remedy="correct it"),
    )
    return shards


def load_references(path: Path, split: str | None) -> dict[str, list[str]]:
    """Captions by the picture's file name, with the folder that the file names: ``val2014/x.jpg``.

    ``split`` is one of Karpathy's, or several as ``train+restval``; COCO's own files name none.
    """
    require(not path.is_dir(), f"{path}: references are a JSON file, not a directory")
    rows, _ = _read_published(path, path.parent, split)
    return {row.record["file_name"]: row.record["captions"] for row in rows}


def _read_published(path: Path, pictures: Path, split: str | None) -> tuple[list[SourceRow], dict[str, Any]]:
    """Rows of published files, and what a manifest says of these, as the builder reads them."""
    layout = "scienceqa" if path.is_dir() else "karpathy" if _is_karpathy(path) else "coco"
    if layout != "coco" and split is None:
        raise UserError(f"{path} holds several splits; name one with --split")
    values = {"annotations": path, "dataset": path, "root": path, "images": pictures, "split": split}
    # A picture without a caption cannot be scored, but every problem must be.
    bad = BadRows(skip=layout != "scienceqa", remedy="correct it")
    rows, facts = read_layout(layout, values | {"captions": None, "allow_missing_images": True}, bad=bad)
    bad.report(len(rows))
    missing = sum(bool(row.record.get("image_missing")) for row in rows)
    require(
        not missing or any(row.image for row in rows),
        f"{path}: none of the {missing} pictures of {split} is there, as images/SPLIT/PID/NAME; unpack them, "
        f"or build shards without them: tools/build_shards.py scienceqa --root {path} --split {split} "
        "--allow-missing-images --output DIR",
    )
    return rows, facts


def _is_karpathy(path: Path) -> bool:
    """Whether a JSON file holds splits of captions; its reader says what is wrong with it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and "images" in content and "annotations" not in content
    return False


def digest_of(terms: Mapping[str, Any]) -> str:
    """A hash of JSON values, the same for equal ones."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()[:16]


def match_references(
    references: Mapping[str, Sequence[str]], file_names: Mapping[str, str]
) -> dict[str, list[str]]:
    """Each row's captions by its picture's file name; none for a row, or several candidates, is an error.

    Two names are of one picture where their folders agree as far as both have them (``x.jpg`` and
    ``val2014/x.jpg``, but not ``train2014/x.jpg``) and their last parts are the same: as they are written, or
    else in any Unicode form and with any ending of a picture's. ``file_names`` has the rows' keys.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in references:
        by_stem[_stem(name)].append(name)
    taken: dict[str, str] = {}
    lacking = []
    for key, name in file_names.items():
        near = [other for other in by_stem[_stem(name)] if _folders_agree(name, other)]
        same = [other for other in near if PurePosixPath(other).name == PurePosixPath(name).name]
        found = [name] if name in references else same or near
        several = f"{name}: the references have several such pictures: {', '.join(found[:3])}"
        require(len(found) < 2, several)
        if not found:
            lacking.append(name)
            continue
        other = taken.setdefault(found[0], key)
        both = f"{file_names[other]} and {name} of the rows are both {found[0]} of the references"
        require(other == key, both)
    if lacking:
        raise UserError(
            f"the references lack {len(lacking)} of {len(file_names)} evaluated pictures, {lacking[0]} the "
            "first; are they of another split?"
        )
    return {key: list(references[name]) for name, key in taken.items()}


def _stem(name: str) -> str:
    plain = unicodedata.normalize("NFC", PurePosixPath(name).name)
    stem, _, ending = plain.rpartition(".")
    return stem if stem and ending.lower() in _ENDINGS else plain


def _folders_agree(one: str, other: str) -> bool:
    folders = [PurePosixPath(unicodedata.normalize("NFC", name)).parts[:-1] for name in (one, other)]
    shared = min(map(len, folders))
    return shared == 0 or folders[0][-shared:] == folders[1][-shared:]
