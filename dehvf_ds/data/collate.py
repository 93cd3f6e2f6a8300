"""From samples to the tensors of one micro-batch: token ids, labels, pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_uppercase

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.chat import encode_chat, encode_chat_prompt, parse_conversation
from dehvf_ds.data.prompts import QCM_A, SCIENCEQA_ANSWER_PREFIX, Task, build_prompt, build_target
from dehvf_ds.data.transforms import ImageTransform
from dehvf_ds.model import ModelError, processing
from dehvf_ds.model.processing import TokenizerTraits, prompt_ids, target_ids, tokenizer_name


def tokenizer_traits(tokenizer: PreTrainedTokenizerBase) -> TokenizerTraits:
    """How a tokenizer behaves where prompt and target meet.

    Raises:
        UserError: the tokenizer has no end-of-text token, or no seam makes prompt and target one text.
    """
    try:
        return processing.tokenizer_traits(tokenizer)
    except ModelError as error:
        raise UserError(str(error)) from None


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Turns prompt and target into ids and labels: ``prompt_ids``, target, eos; the last two supervised.

    The two are tokenised apart, so that the labels' border cannot drift; ``tokenizer_traits`` keeps the
    seam. A target that does not fit loses its end, and then its eos too: the model is not taught to stop in
    the middle. Where the prompt alone fills ``max_tokens`` it is cut and no token is supervised.

    Args:
        tokenizer: the LLM's tokenizer.
        prompt: text before the target; space at its end is left out.
        target: text to learn, without a space at its start. Special tokens in it are taken as plain text.
        max_tokens: longest row.

    Returns:
        ids and labels, equally long; ``IGNORE_INDEX`` at positions that are not supervised.
    """
    traits = tokenizer_traits(tokenizer)
    head = prompt_ids(tokenizer, prompt)
    tail = [*target_ids(tokenizer, prompt, target), traits.eos_id]
    ids = (head + tail)[:max_tokens]
    return ids, ([IGNORE_INDEX] * len(head) + tail)[:max_tokens]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, answer_prefix: str = "") -> list[int]:
    """The ids to generate from: the prompt's, and of the target's first words where evaluation gives them.

    Never cut: a prompt without its end asks another question.
    """
    tokenizer_traits(tokenizer)
    return prompt_ids(tokenizer, prompt) + target_ids(tokenizer, prompt, answer_prefix)


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last token of ``The answer is X`` for each letter X from A to Z; those before it are the same.

    Raises:
        UserError: the tokenizer makes another text of a letter than one token at the end.
    """
    rows = [
        encode_prompt(tokenizer, "Response:", f"{SCIENCEQA_ANSWER_PREFIX} {letter}")
        for letter in ascii_uppercase
    ]
    if any(row[:-1] != rows[0][:-1] for row in rows) or len({row[-1] for row in rows}) < len(rows):
        raise UserError(f"{tokenizer_name(tokenizer)}: a letter after the prompt is not one token of its own")
    return [row[-1] for row in rows]


class Collator:
    """Makes one ``Batch`` of samples: right padding for training, left padding for generation."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: ImageTransform,
        *,
        task: Task,
        max_tokens: int,
        prompt: str | None = None,
        scienceqa: ScienceqaConfig = QCM_A,
        augment: Callable[[Image.Image, Sample], Image.Image] | None = None,
        for_generation: bool = False,
        answer_prefix: str = "",
    ):
        """Keeps what rows are made with.

        Args:
            tokenizer: the LLM's tokenizer.
            image_transform: from an RGB picture to normalised pixels; text-only rows get zeros of its size.
            task: chooses prompt and target.
            max_tokens: longest row in training; prompts of generation are not cut.
            prompt: the caption task's instruction; None takes the default.
            scienceqa: form of ScienceQA's prompt and target.
            augment: gives another view of a sample's picture, in training only.
            for_generation: rows hold the prompt alone and no label.
            answer_prefix: with ``for_generation``, the target's first words; not for conversations.

        Raises:
            UserError: the tokenizer has no end-of-text token or no usable seam.
        """
        self._tokenizer = tokenizer
        self._transform = image_transform
        self._task: Task = task
        self._max_tokens = max_tokens
        self._prompt = prompt
        self._scienceqa = scienceqa
        self._augment = None if for_generation else augment
        self._for_generation = for_generation
        self._answer_prefix = answer_prefix
        self._pad_id = tokenizer_traits(tokenizer).pad_id

    @property
    def image_size(self) -> int:
        """Side in pixels that pictures are brought to; what ``read_sample`` takes as shorter_side."""
        return self._transform.image_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates samples into a batch.

        Raises:
            UserError: a conversation is damaged or does not suit the tokenizer; the line names the sample.
        """
        rows = [self._row(sample) for sample in samples]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self._pad_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (ids, row_labels) in enumerate(rows):
            place = slice(width - len(ids), width) if self._for_generation else slice(len(ids))
            input_ids[i, place] = torch.tensor(ids)
            labels[i, place] = torch.tensor(row_labels)
            attention_mask[i, place] = 1
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=self._pixels(samples),
            has_image=torch.tensor([sample.image is not None for sample in samples]),
            keys=tuple(sample.key for sample in samples),
        )

    def _row(self, sample: Sample) -> tuple[list[int], list[int]]:
        if self._task == "chat":
            return self._chat_row(sample)
        record, scienceqa = sample.record, self._scienceqa
        prompt = build_prompt(record, self._task, prompt=self._prompt, scienceqa=scienceqa)
        if self._for_generation:
            return _without_labels(encode_prompt(self._tokenizer, prompt, self._answer_prefix))
        target = build_target(record, self._task, scienceqa=scienceqa)
        return encode(self._tokenizer, prompt, target, self._max_tokens)

    def _chat_row(self, sample: Sample) -> tuple[list[int], list[int]]:
        try:
            messages = parse_conversation(sample.record, needs_answer=not self._for_generation)
            if self._for_generation:
                return _without_labels(encode_chat_prompt(self._tokenizer, messages))
            return encode_chat(self._tokenizer, messages, self._max_tokens)
        except UserError as error:
            raise UserError(f"sample {sample.key}: {error}") from None

    def _pixels(self, samples: Sequence[Sample]) -> Float[Tensor, "batch 3 height width"]:
        size = self._transform.image_size
        pixels = torch.zeros(len(samples), 3, size, size)
        for i, sample in enumerate(samples):
            if sample.image is not None:
                view = self._augment(sample.image, sample) if self._augment else sample.image
                pixels[i] = self._transform(view)
        return pixels


def _without_labels(ids: list[int]) -> tuple[list[int], list[int]]:
    return ids, [IGNORE_INDEX] * len(ids)
