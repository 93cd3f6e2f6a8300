"""From samples to the tensors of one micro-batch: texts to token ids and labels, pictures to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.chat import encode_chat, encode_chat_prompt, parse_conversation
from dehvf_ds.data.prompts import QCM_A, SCIENCEQA_ANSWER_PREFIX, Task, build_prompt, build_target
from dehvf_ds.model import ModelError
from dehvf_ds.model.fingerprint import POINTER, is_pointer
from dehvf_ds.model.pictures import to_pixels
from dehvf_ds.model.processing import prompt_ids, target_ids, tokenizer_name, tokenizer_traits

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory or hub id; one without a pad token pads with its end of text.

    One that prompts and targets cannot be made with is refused (``tokenizer_traits``).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of a damaged file, about anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        pointers = [path for path in sorted(Path(source).glob("*")) if path.is_file() and is_pointer(path)]
        if pointers:
            reason = f"{pointers[0].name} is {POINTER}"
        raise UserError(f"no tokenizer at {source}: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer_traits(tokenizer)
    except ModelError as error:
        raise UserError(str(error)) from None
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuses a tokenizer that is another model's, as far as its size tells.

    ``num_embeddings`` are the rows of the language model's embedding: some more than ids, never fewer.
    """
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=lambda word: vocabulary[word])
    if vocabulary[token] >= num_embeddings:
        found = f"its token {token!r} has id {vocabulary[token]}, but"
    elif 2 * len(vocabulary) < num_embeddings:
        found = f"knows {len(vocabulary)} tokens, and"
    else:
        return
    raise UserError(
        f"{tokenizer_name(tokenizer)}: {found} the language model has {num_embeddings} embeddings; take the "
        "tokenizer that came with the model"
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Turns prompt and target into ids and labels: ``prompt_ids``, target, eos; the last two supervised.

    The two are tokenised apart, so that the labels' border cannot drift. A target that does not fit into
    ``max_tokens`` loses its end, and then its eos too: the model is not taught to stop in the middle. Where
    the prompt alone fills the row it is cut and no token is supervised (``IGNORE_INDEX``).
    """
    head = prompt_ids(tokenizer, prompt)
    tail = [*target_ids(tokenizer, prompt, target), tokenizer_traits(tokenizer).eos_id]
    return (head + tail)[:max_tokens], ([IGNORE_INDEX] * len(head) + tail)[:max_tokens]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, answer_prefix: str = "") -> list[int]:
    """The ids to generate from: the prompt's, and of the target's first words where evaluation gives them.

    Never cut: a prompt without its end asks another question.
    """
    return prompt_ids(tokenizer, prompt) + target_ids(tokenizer, prompt, answer_prefix)


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last token of ``The answer is X`` for each letter X from A to Z; those before it are the same."""
    rows = [
        encode_prompt(tokenizer, "Response:", f"{SCIENCEQA_ANSWER_PREFIX} {letter}")
        for letter in ascii_uppercase
    ]
    if any(row[:-1] != rows[0][:-1] for row in rows) or len({row[-1] for row in rows}) < len(rows):
        raise UserError(f"{tokenizer_name(tokenizer)}: a letter after the prompt is not one token of its own")
    return [row[-1] for row in rows]


class ImageTransform:
    """A vision tower's own image processor as a function of one picture.

    Attributes:
        image_size: side of the square output in pixels.
        processor: the configured image processor.
    """

    def __init__(self, processor: BaseImageProcessor):
        """Learns the output size from trial pictures, and refuses pictures that are not square."""
        sizes = _output_sizes(processor)
        if len({side for size in sizes for side in size}) > 1:
            found = " and ".join(f"{height} x {width}" for height, width in sizes)
            raise UserError(
                f"the vision tower's image processor gives pictures of {found} pixels, not one square; set "
                "model.image_size"
            )
        self.processor = processor
        self.image_size = sizes[0][0]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Resizes, crops and normalises a picture (float32), see ``to_pixels``."""
        return to_pixels(self.processor, image)


def build_image_transform(vision_tower_dir: str | Path, image_size: int | None) -> ImageTransform:
    """Builds the transform of a vision tower from its ``preprocessor_config.json``, in the PIL backend.

    Args:
        vision_tower_dir: local directory or hub id of the tower.
        image_size: side of the output in pixels. None, or the size that the processor makes anyway, keeps
            its own way of resizing; for another the shortest edge is resized to it and the centre cropped.
    """
    directory = Path(vision_tower_dir)
    if directory.is_dir() and not any((directory / name).is_file() for name in _PROCESSOR_FILES):
        raise UserError(f"{directory}: no {_PROCESSOR_FILES[0]}; copy it from where the vision tower came")
    load = partial(AutoImageProcessor.from_pretrained, str(vision_tower_dir), backend="pil")
    try:
        processor = load()
        if image_size is not None and set(_output_sizes(processor)) != {(image_size, image_size)}:
            square, own = {"height": image_size, "width": image_size}, processor.size
            # A tower that squashes to a square (SigLIP) keeps to it.
            squashes = own is not None and own["height"]
            crops = {"size": {"shortest_edge": image_size}, "do_center_crop": True}
            sizes = {"size": square} if squashes else crops
            processor = load(do_resize=True, crop_size=square, **sizes)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.vision_tower {vision_tower_dir}: no usable image processor: {reason}"
        ) from None
    return ImageTransform(processor)


def _output_sizes(processor: BaseImageProcessor) -> list[tuple[int, int]]:
    """Height and width that a wide and a tall picture become."""
    trials = (Image.new("RGB", size) for size in ((40, 20), (20, 40)))
    return [(pixels.shape[1], pixels.shape[2]) for pixels in (to_pixels(processor, t) for t in trials)]


@dataclass(frozen=True)
class Collator:
    """Makes one ``Batch`` of samples: right padding for training, left padding for generation.

    Attributes:
        tokenizer: the LLM's tokenizer.
        image_transform: from an RGB picture to normalised pixels; text-only rows get zeros of its size.
        task: chooses prompt and target.
        max_tokens: longest row in training; prompts of generation are not cut.
        prompt: the caption task's instruction; None takes the default.
        scienceqa: form of ScienceQA's prompt and target.
        augment: gives another view of a sample's picture, in training only.
        for_generation: rows hold the prompt alone and no label.
        answer_prefix: with ``for_generation``, the target's first words; not for conversations.
    """

    tokenizer: PreTrainedTokenizerBase
    image_transform: ImageTransform
    _: KW_ONLY
    task: Task
    max_tokens: int
    prompt: str | None = None
    scienceqa: ScienceqaConfig = QCM_A
    augment: Callable[[Image.Image, Sample], Image.Image] | None = None
    for_generation: bool = False
    answer_prefix: str = ""

    @property
    def image_size(self) -> int:
        """Side in pixels that pictures are brought to; what ``read_sample`` takes as shorter_side."""
        return self.image_transform.image_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates samples into a batch; a conversation that does not suit the tokenizer names its sample."""
        rows = [self._row(sample) for sample in samples]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), tokenizer_traits(self.tokenizer).pad_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (ids, row_labels) in enumerate(rows):
            place = slice(width - len(ids), width) if self.for_generation else slice(len(ids))
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
        if self.task == "chat":
            return self._chat_row(sample)
        prompt = build_prompt(sample.record, self.task, prompt=self.prompt, scienceqa=self.scienceqa)
        if self.for_generation:
            return _without_labels(encode_prompt(self.tokenizer, prompt, self.answer_prefix))
        target = build_target(sample.record, self.task, scienceqa=self.scienceqa)
        return encode(self.tokenizer, prompt, target, self.max_tokens)

    def _chat_row(self, sample: Sample) -> tuple[list[int], list[int]]:
        try:
            needs_answer = not self.for_generation
            messages = sample.messages or parse_conversation(sample.record, needs_answer=needs_answer)
            if self.for_generation:
                return _without_labels(encode_chat_prompt(self.tokenizer, messages))
            return encode_chat(self.tokenizer, messages, self.max_tokens)
        except UserError as error:
            raise UserError(f"sample {sample.key}: {error}") from None

    def _pixels(self, samples: Sequence[Sample]) -> Float[Tensor, "batch 3 height width"]:
        augment = None if self.for_generation else self.augment
        pixels = torch.zeros(len(samples), 3, self.image_size, self.image_size)
        for i, sample in enumerate(samples):
            if sample.image is not None:
                view = augment(sample.image, sample) if augment else sample.image
                pixels[i] = self.image_transform(view)
        return pixels


def _without_labels(ids: list[int]) -> tuple[list[int], list[int]]:
    return ids, [IGNORE_INDEX] * len(ids)
