"""What is asked: rows of shards, the form of the prompt, and how answers are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.collate import Collator, letter_ids
from dehvf_ds.data.damage import DamagedSample
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import read_sample
from dehvf_ds.data.prompts import SCIENCEQA_ANSWER_PREFIX, Task
from dehvf_ds.data.records import parse_record
from dehvf_ds.data.transforms import ImageTransform
from dehvf_ds.evals.coco_tokens import require_java
from dehvf_ds.evals.decode import Decoding, decode_answers, likeliest_options, require_positions
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration

EvalTask = Literal["coco", "scienceqa"]
Reading = Literal["generation", "likelihood"]
Record = tuple[str, dict[str, Any]]

TASKS: dict[str, EvalTask] = {"caption": "coco", "scienceqa": "scienceqa"}
"""What is scored, by ``data.task``."""

UNREADABLE = "unreadable"
"""Key of an answer that there is none of: {UNREADABLE: why the row's picture could not be read}."""

MAX_NEW_TOKENS: dict[EvalTask, int] = {"coco": 40, "scienceqa": 8}


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The rows of an evaluation, opened.

    Attributes:
        task: what is scored.
        index: the shards.
        num_rows: rows to ask, from the first.
        collator: makes prompts, padded on the left.
        tokenizer: the model's.
        decoding: lengths and beams.
        letters: token of each option where the likeliest is taken; empty where answers are generated.
    """

    task: EvalTask
    index: ShardIndex
    num_rows: int
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    letters: tuple[int, ...] = ()

    def ask(self, model: DehvfForConditionalGeneration, rows: Sequence[int]) -> list[Any]:
        """Answers some rows together.

        Returns:
            Texts, or the number of the likeliest option (None where no logit is a number); of a row whose
            picture cannot be read an object that says why, under ``UNREADABLE``.

        Raises:
            UserError: a shard cannot be read; the network may be down, and that is no answer.
        """
        samples = [self._read(row) for row in rows]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        answers = iter(self._answer(model, good) if good else [])
        return [next(answers) if isinstance(sample, Sample) else sample for sample in samples]

    def _read(self, row: int) -> Sample | dict[str, str]:
        try:
            return read_sample(self.index, row, shorter_side=self.collator.image_size)
        except DamagedSample as error:
            # Of the picture alone: a shard that cannot be read raises once more.
            self.index.read(row)
            return {UNREADABLE: " ".join(str(error).split())}

    def _answer(self, model: DehvfForConditionalGeneration, samples: Sequence[Sample]) -> list[Any]:
        batch = self.collator(samples)
        if self.letters:
            counts = [len(sample.record["choices"]) for sample in samples]
            return next(likeliest_options(model, [batch.without_last()], self.letters, counts))
        return next(decode_answers(model, [batch], self.tokenizer, self.decoding))

    def require_positions(self, model_config: DehvfConfig) -> None:
        """Refuses a longest answer for which the decoder has no positions behind the longest prompt.

        Raises:
            UserError: it has none.
        """
        lengths = self.prompt_lengths()
        _, record = self._record(lengths.index(max(lengths)))
        prompt = self.collator([Sample(key="", image=None, record=record)]).input_ids
        require_positions(prompt.shape[1], self.decoding, model_config)

    def prompt_lengths(self) -> list[int]:
        """Of each row, in characters; 1 for captions, whose prompts are all the same."""
        if self.task == "coco":
            return [1] * self.num_rows
        return self.index.text_lengths[: self.num_rows].tolist()

    def records(self) -> list[Record]:
        """Keys and records; one row at a time: the pictures of a whole split would not fit into memory.

        Raises:
            UserError: a row is damaged, so that nobody knows what it asks.
        """
        return self._records

    @cached_property
    def _records(self) -> list[Record]:
        return [self._record(row) for row in range(self.num_rows)]

    def _record(self, row: int) -> Record:
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

    Args:
        data: directory of the shards.
        task: what is scored.
        tokenizer: the language model's.
        transform: the vision tower's.
        prompt: instruction of captions.
        scienceqa: form of ScienceQA's prompts.
        reading: how ScienceQA's letter is found.
        caption_tokenizer: of the caption scores.
        max_new_tokens: longest answer; None takes the task's own.
        min_new_tokens: shortest answer.
        num_beams: hypotheses of beam search.
        max_samples: rows to ask, from the first; None means all.

    Raises:
        UserError: the rows are of another task, a length contradicts another, or Java is missing.
    """
    longest = max_new_tokens or MAX_NEW_TOKENS[task]
    if min_new_tokens > longest:
        raise UserError(
            f"--min_new_tokens {min_new_tokens} is more than the longest answer, {longest} tokens"
        )
    index = ShardIndex(data)
    without = index.num_without_captions
    if task == "coco" and without:
        raise UserError(
            f"{data}: holds rows without captions, which --task coco cannot score; "
            "problems of ScienceQA need --task scienceqa"
        )
    if task == "scienceqa" and without < len(index):
        raise UserError(
            f"{data}: holds captions, not problems, which --task scienceqa cannot score; captions need "
            "--task coco"
        )
    index.check_task("caption" if task == "coco" else "scienceqa", "--task")
    if task == "coco" and reading == "likelihood":
        raise UserError("--reading likelihood is ScienceQA's; captions are generated")
    if task == "coco" and caption_tokenizer == "ptb":
        require_java()
    return Questions(
        task=task,
        index=index,
        num_rows=min(len(index), max_samples or len(index)),
        collator=build_collator(
            task,
            tokenizer,
            transform,
            prompt=prompt,
            scienceqa=scienceqa,
            answer_prefix=_prefix(task, reading),
        ),
        tokenizer=tokenizer,
        decoding=Decoding(
            max_new_tokens=longest,
            min_new_tokens=min_new_tokens,
            num_beams=num_beams,
        ),
        letters=tuple(letter_ids(tokenizer)) if reading == "likelihood" else (),
    )


def require_task(task: EvalTask, trained_for: str | None, *, prompt: str | None) -> str | None:
    """Looks whether a model was trained for what it is asked.

    Args:
        task: what is scored.
        trained_for: the model's ``task``; None where nothing says so.
        prompt: the instruction of captions that the user gave.

    Returns:
        A line for the user, where the question has another form than the training's; else None.

    Raises:
        UserError: it was trained for the other task.
    """
    if trained_for is None or TASKS.get(trained_for) == task:
        return None
    told = f"the model was trained for {trained_for}, and --task {task} asks for something else"
    if trained_for in TASKS and prompt is None:
        raise UserError(
            f"{told}; pass --task {TASKS[trained_for]} and data of that kind, or name another model"
        )
    return f"warning: {told}; the question is put in a form that it has not seen in training"


def require_image_captions(data: str, questions: Questions) -> None:
    """Refuses captions of pictures as context where the shards hold none.

    Raises:
        UserError: no row with a picture has one.
    """
    with_picture = [record for _, record in questions.records() if record.get("image")]
    if with_picture and not any(record.get("image_caption") for record in with_picture):
        raise UserError(
            f"--image_captions: the problems of {data} have no captions of their pictures; build the shards "
            "with --captions captions.json"
        )


def build_collator(
    task: EvalTask,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    *,
    prompt: str | None,
    scienceqa: ScienceqaConfig,
    answer_prefix: str | None = None,
) -> Collator:
    """A collator of prompts that end in ``answer_prefix``; where that is None, of rows with their targets."""
    of_rows: Task = "caption" if task == "coco" else "scienceqa"
    settings = {"task": of_rows, "prompt": prompt, "scienceqa": scienceqa, "max_tokens": 512}
    if answer_prefix is None:
        return Collator(tokenizer, transform, **settings)
    return Collator(tokenizer, transform, **settings, for_generation=True, answer_prefix=answer_prefix)


def _prefix(task: EvalTask, reading: Reading) -> str:
    if task == "coco":
        return ""
    # Up to the letter, which ``ask`` takes off again: some tokenizers have a token before it.
    return f"{SCIENCEQA_ANSWER_PREFIX} A" if reading == "likelihood" else SCIENCEQA_ANSWER_PREFIX
