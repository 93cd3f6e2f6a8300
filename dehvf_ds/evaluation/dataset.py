"""What an evaluation reads: rows of shards, put as questions; published layouts and reference captions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Sample
from dehvf_ds.config import EvalConfig, ScienceqaConfig, UserError
from dehvf_ds.data.building.sources import (
    BadRows,
    SourceRow,
    describe_file,
    read_coco,
    read_karpathy,
    read_scienceqa,
)
from dehvf_ds.data.building.writer import BuildSettings, build_shards
from dehvf_ds.data.collate import Collator, ImageTransform, letter_ids
from dehvf_ds.data.damage import DamagedSample
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX, Task
from dehvf_ds.data.records import parse_record
from dehvf_ds.evaluation.decode import MAX_NEW_TOKENS, Decoding, decode, likeliest_options, require_positions
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

EvalTask = Literal["coco", "scienceqa"]
Reading = Literal["generation", "likelihood"]

TASKS: dict[str, EvalTask] = {"caption": "coco", "scienceqa": "scienceqa"}
"""What is scored, by ``data.task``."""

Unreadable = dict[Literal["unreadable"], str]
"""Stands for the answer to a row whose picture cannot be read, and says why."""

Prediction = str | int | Unreadable | None
"""A text, or an option's number where the likeliest is taken (None if no logit is a number)."""

NO_JAVA = "no `java` is on the PATH; install one (Debian and Ubuntu: apt-get install default-jre-headless)"

# What follows the last dot of another name belongs to it: "3.5 mm".
_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"}


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The rows of an evaluation, opened.

    Attributes:
        task: what is scored.
        index: the shards.
        num_rows: rows to ask, from the first.
        collator: makes prompts, padded on the left.
        targets: makes rows with their targets, for the loss.
        tokenizer: the model's.
        decoding: lengths and beams.
        letters: token of each option where the likeliest is taken; empty where answers are generated.
    """

    task: EvalTask
    index: ShardIndex
    num_rows: int
    collator: Collator
    targets: Collator
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    letters: tuple[int, ...] = ()

    def ask(self, model: DehvfForConditionalGeneration, rows: Sequence[int]) -> list[Prediction]:
        """Answers some rows together.

        A shard that cannot be read is an error: the network may be down, and that is no answer.
        """
        samples = [self._read(row) for row in rows]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        answers = iter(self._answer(model, good) if good else [])
        return [next(answers) if isinstance(sample, Sample) else sample for sample in samples]

    def _read(self, row: int) -> Sample | Unreadable:
        try:
            return read_sample(self.index, row, shorter_side=self.collator.image_size)
        except DamagedSample as error:
            # Of the picture alone: a shard that cannot be read raises once more.
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
        """Refuses a longest answer for which the decoder has no positions behind the longest prompt."""
        lengths = self.prompt_lengths()
        _, record = self._record(lengths.index(max(lengths)))
        prompt = self.collator([Sample(key="", image=None, record=record)]).input_ids
        require_positions(prompt.shape[1], self.decoding, model_config)

    def prompt_lengths(self) -> list[int]:
        """Of each row, in characters; 1 for captions, whose prompts are all the same."""
        if self.task == "coco":
            return [1] * self.num_rows
        return self.index.text_lengths[: self.num_rows].tolist()

    @cached_property
    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """Keys and records, read one row at a time: a split's pictures would not fit into memory."""
        return [self._record(row) for row in range(self.num_rows)]

    def _record(self, row: int) -> tuple[str, dict[str, Any]]:
        members = self.index.read(row)
        return members["__key__"], parse_record(members)


def open_questions(
    data: str,
    task: EvalTask,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    *,
    prompt: str | None,
    scienceqa: ScienceqaConfig,
    reading: Reading = "generation",
    caption_tokenizer: Literal["ptb", "simple"] = "ptb",
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    max_samples: int | None = None,
) -> Questions:
    """Opens shards for an evaluation, and checks now what would else fail after hours of decoding.

    ``prompt`` is of captions, ``scienceqa`` the form of problems, ``reading`` how their letter is found,
    ``caption_tokenizer`` that of the scores; None takes the task's longest answer, and all rows.
    """
    of_captions = task == "coco"
    rows: Task = "caption" if of_captions else "scienceqa"
    longest = max_new_tokens or MAX_NEW_TOKENS[rows]
    if min_new_tokens > longest:
        raise UserError(
            f"--min_new_tokens {min_new_tokens} is more than the longest answer, {longest} tokens"
        )
    if of_captions and reading == "likelihood":
        raise UserError("--reading likelihood is ScienceQA's; captions are generated")
    index = ShardIndex(data)
    without = index.num_without_captions
    if without != (0 if of_captions else len(index)):
        held, other = ("rows without captions", "scienceqa") if of_captions else ("captions", "coco")
        raise UserError(f"{data}: holds {held}, which --task {task} cannot score; they need --task {other}")
    index.check_task(rows, "--task")
    if of_captions and caption_tokenizer == "ptb":
        require_java()
    prefix = "" if of_captions else SCIENCEQA_ANSWER_PREFIX
    if reading == "likelihood":
        # Up to the letter, which ``ask`` takes off again: some tokenizers have a token before it.
        prefix = f"{prefix} A"
    form: dict[str, Any] = {"task": rows, "prompt": prompt, "scienceqa": scienceqa, "max_tokens": 512}
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


def require_java() -> None:
    """Refuses PTB tokenization where it cannot run."""
    if shutil.which("java") is None:
        raise UserError(
            f"PTB tokenization needs a Java runtime and {NO_JAVA}, or take the simple tokenizer, whose "
            "scores compare with no published ones"
        )


def is_published(data: str) -> bool:
    """Whether ``data`` is a ScienceQA directory or a JSON file of captions, and not a directory of shards."""
    return Path(data).is_file() or (Path(data) / "problems.json").is_file()


def published_shards(config: EvalConfig, output: Path) -> Path:
    """Builds shards of what is published, or finds them built of the same files. Rank 0 alone.

    Args:
        config: ``data`` is a directory with ``problems.json`` and ``pid_splits.json``, COCO's
            ``captions_*.json`` or Karpathy's ``dataset_*.json``; ``images`` the pictures of the latter two.
        output: directory of the shards; a digest of files, split and pictures is added to its name.
    """
    data = Path(config.data)
    if data.is_file() and data.suffix.lower() != ".json":
        raise UserError(
            f"--data {data}: a file that is no .json; name the directory of the shards, that of ScienceQA, "
            "or a file of COCO's captions or Karpathy's splits"
        )
    is_scienceqa = data.is_dir()
    files = [data / "problems.json", data / "pid_splits.json"] if is_scienceqa else [data]
    described = [describe_file(file) for file in files]
    pictures = Path(config.images) if config.images else files[0].parent
    contents = [file["sha256"] for file in described]
    terms = {"contents": contents, "split": config.split, "pictures": str(pictures.resolve())}
    shards = output.with_name(f"{output.name}-{digest_of(terms)[:8]}")
    if is_scienceqa:
        rows = _problem_rows(data, _required_split(data, config.split))
        facts = {"source": "scienceqa", "split": config.split, "allow_missing_images": True}
        facts |= {"problems": described[0], "pid_splits": described[1]}
    else:
        rows = _caption_rows(data, pictures, config.split)
        facts = {"source": "coco", "annotations": described[0]}
        if _is_karpathy(data):
            facts = {"source": "karpathy", "split": config.split, "dataset": described[0]}
    # No row is left out: scores would be of other rows than the published ones.
    bad = BadRows(skip=False, remedy="correct it")
    build = {"name": config.task, "settings": BuildSettings(), "num_workers": 1, "progress": False}
    build_shards(rows, shards, facts=facts, bad=bad, **build)
    return shards


def _problem_rows(root: Path, split: str) -> list[SourceRow]:
    bad = BadRows(skip=False, remedy="correct it")
    rows = read_scienceqa(root, split, allow_missing_images=True, bad=bad)
    missing = sum(bool(row.record.get("image_missing")) for row in rows)
    if missing and all(row.image is None for row in rows):
        raise UserError(
            f"{root}: none of the {missing} pictures of {split} is there, as images/SPLIT/PID/NAME; unpack "
            f"them, or build shards without them: tools/build_shards.py scienceqa --root {root} "
            f"--split {split} --allow-missing-images --output DIR"
        )
    return rows


def _caption_rows(path: Path, images: Path, split: str | None) -> list[SourceRow]:
    # A picture without a caption cannot be scored.
    bad = BadRows(skip=True)
    if _is_karpathy(path):
        rows = read_karpathy(path, images, _required_split(path, split), bad=bad)
    else:
        rows = read_coco(path, images, bad=bad)
    bad.tell(len(rows) + sum(bad.counts.values()))
    return rows


def _is_karpathy(path: Path) -> bool:
    """Whether a JSON file holds splits of captions; what is wrong with it is told by who reads it then."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and "images" in content and "annotations" not in content
    return False


def load_references(path: Path, split: str | None) -> dict[str, list[str]]:
    """Captions by the picture's file name, with the folder that the file names: ``val2014/x.jpg``.

    ``split`` is one of Karpathy's, or several as ``train+restval``; COCO's own files name none.
    """
    return {
        row.record["file_name"]: row.record["captions"] for row in _caption_rows(path, path.parent, split)
    }


def _required_split(data: Path, split: str | None) -> str:
    if split is None:
        raise UserError(f"{data} holds several splits; name one with --split")
    return split


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
        if len(found) > 1:
            raise UserError(f"{name}: the references have several such pictures: {', '.join(found[:3])}")
        if not found:
            lacking.append(name)
        elif (other := taken.setdefault(found[0], key)) != key:
            raise UserError(
                f"{file_names[other]} and {name} of the rows are both {found[0]} of the references"
            )
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
