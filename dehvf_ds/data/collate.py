"""From samples to the tensors of one micro-batch: texts to token ids and labels, pictures to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from dehvf_ds.batch import IGNORE_INDEX, Batch, Sample
from dehvf_ds.config import ScienceqaConfig, UserError
from dehvf_ds.data.prompts import (
    QCM_A,
    SCIENCEQA_ANSWER_PREFIX,
    Task,
    build_prompt,
    build_target,
    encode_chat,
    encode_chat_prompt,
    parse_conversation,
)
from dehvf_ds.data.shards import one_line
from dehvf_ds.model import ModelError
from dehvf_ds.model.fingerprint import POINTER, is_pointer
from dehvf_ds.model.pictures import to_pixels
from dehvf_ds.model.processing import prompt_ids, target_ids, tokenizer_name, tokenizer_traits

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory or hub id; without a pad token it pads with its end of text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # damaged files raise almost anything
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
    """Refuses a tokenizer that belongs to another model, judging by the size of its vocabulary.

    A model's ``num_embeddings`` may exceed the number of ids somewhat, but never falls below it.
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
        f"{tokenizer_name(tokenizer)}: {found} the language model has {num_embeddings} embeddings; use the "
        "tokenizer that came with the model"
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """Turns prompt and target into ids and labels: ``prompt_ids``, target, eos; the last two supervised.

    The two are tokenised separately, so that the boundary of the labels cannot drift. A target that does not
    fit into ``max_tokens`` is cut and has no eos: the model must not learn to stop in the middle. If the
    prompt fills the row, no token is supervised.
    """
    head = prompt_ids(tokenizer, prompt)
    tail = [*target_ids(tokenizer, prompt, target), tokenizer_traits(tokenizer).eos_id]
    return (head + tail)[:max_tokens], ([IGNORE_INDEX] * len(head) + tail)[:max_tokens]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, answer_prefix: str = "") -> list[int]:
    """The ids to generate from: those of the prompt, never cut, and of the target's first words if any."""
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
    """A vision tower's own image processor; ``image_size`` is the side of its square output in pixels."""

    def __init__(self, processor: BaseImageProcessor):
        """Finds the output size by trial; refuses a processor whose pictures are not square."""
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

    ``image_size`` is the side of the output in pixels. None, or the processor's own size, keeps its way of
    resizing; otherwise the shortest edge is resized to it and the centre cropped.
    """
    directory = Path(vision_tower_dir)
    if directory.is_dir() and not any((directory / name).is_file() for name in _PROCESSOR_FILES):
        raise UserError(f"{directory}: no {_PROCESSOR_FILES[0]}; copy it from the source of the vision tower")
    load = partial(AutoImageProcessor.from_pretrained, str(vision_tower_dir), backend="pil")
    try:
        processor = load()
        if image_size is not None and set(_output_sizes(processor)) != {(image_size, image_size)}:
            square, own = {"height": image_size, "width": image_size}, processor.size
            # A tower that squashes to a square (SigLIP) still does.
            squashes = own is not None and own["height"]
            crops = {"size": {"shortest_edge": image_size}, "do_center_crop": True}
            sizes = {"size": square} if squashes else crops
            processor = load(do_resize=True, crop_size=square, **sizes)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        unusable = f"model.vision_tower {vision_tower_dir}: no usable image processor"
        raise UserError(f"{unusable}: {one_line(error)}") from None
    return ImageTransform(processor)


def _output_sizes(processor: BaseImageProcessor) -> list[tuple[int, int]]:
    """Height and width of the output for a wide and a tall picture."""
    trials = (Image.new("RGB", size) for size in ((40, 20), (20, 40)))
    return [(pixels.shape[1], pixels.shape[2]) for pixels in (to_pixels(processor, t) for t in trials)]


@dataclass(frozen=True)
class Collator:
    """Makes one ``Batch`` of samples: right padding for training, left padding for generation.

    Attributes:
        image_transform: from an RGB picture to normalised pixels.
        max_tokens: longest row in training; prompts of generation are not cut.
        prompt: the caption task's instruction; None takes the default.
        augment: returns a random view of a sample's picture, in training only.
        for_generation: rows hold the prompt only and no label.
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
        """Side of the pictures in pixels, for ``read_sample``'s shorter_side."""
        return self.image_transform.image_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates samples into a batch."""
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
        pixel_values, picture = self._pictures(samples)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=pixel_values,
            picture=picture,
            has_image=torch.tensor([sample.image is not None for sample in samples]),
            keys=tuple(sample.key for sample in samples),
        )

    def _row(self, sample: Sample) -> tuple[list[int], list[int]]:
        if self.task == "chat":
            try:
                messages = sample.messages or parse_conversation(
                    sample.record, needs_answer=not self.for_generation
                )
                if not self.for_generation:
                    return encode_chat(self.tokenizer, messages, self.max_tokens)
                ids = encode_chat_prompt(self.tokenizer, messages)
            except UserError as error:
                raise UserError(f"sample {sample.key}: {error}") from None
        else:
            prompt = build_prompt(sample.record, self.task, prompt=self.prompt, scienceqa=self.scienceqa)
            if not self.for_generation:
                target = build_target(sample.record, self.task, scienceqa=self.scienceqa)
                return encode(self.tokenizer, prompt, target, self.max_tokens)
            ids = encode_prompt(self.tokenizer, prompt, self.answer_prefix)
        return ids, [IGNORE_INDEX] * len(ids)

    def _pictures(
        self, samples: Sequence[Sample]
    ) -> tuple[Float[Tensor, "pictures 3 height width"], Int[Tensor, " batch"] | None]:
        """The samples' pictures, each once, and which one each sample shows, as in ``Batch``.

        Samples show the same if they share the picture and, where views are random, what these are drawn for.
        """
        augment = None if self.for_generation else self.augment
        numbers: dict[tuple[int, ...], int] = {}
        views: list[Tensor] = []
        shown = []
        for sample in samples:
            if sample.image is None:
                shown.append(0)
                continue
            drawn_for = (sample.epoch, sample.example) if augment else ()
            number = numbers.setdefault((id(sample.image), *drawn_for), len(views))
            if number == len(views):
                view = augment(sample.image, sample) if augment else sample.image
                views.append(self.image_transform(view))
            shown.append(number)
        if len(views) == len(samples):
            return torch.stack(views), None
        if not views:
            views = [torch.zeros(3, self.image_size, self.image_size)]
        return torch.stack(views), torch.tensor(shown)
