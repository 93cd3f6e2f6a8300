"""An evaluation of a trained model, and captions from the shell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dehvf_ds.config.errors import require
from dehvf_ds.config.kinds import AtLeastZero, Beams, LocalPath, Positive, Rows, Tokens, check_ranges


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation of a trained model.

    Attributes:
        model: run directory, adapter artifact or merged model directory.
        data: directory of evaluation shards with their ``manifest.json``, or as published: ScienceQA's
            directory of ``problems.json``, COCO's ``captions_*.json``, Karpathy's ``dataset_*.json``.
        images: directory of the pictures of such a JSON file; None takes the file's own.
        references: COCO's ``captions_*.json`` or Karpathy's ``dataset_*.json`` to score captions against, by
            file name; of Karpathy's the part ``split``. None takes the captions in the shards.
        task: what is scored: ``coco`` captions, ``scienceqa`` answers.
        split: name of the split in the output; None takes the name of ``data``.
        output: where ``TASK-SPLIT/`` is written; None means ``eval/`` of the run.
        batch_size: rows decoded together on one rank.
        max_new_tokens: longest answer in tokens; None takes 40 for captions and 8 for ScienceQA.
        min_new_tokens: shortest answer in tokens.
        num_beams: hypotheses of beam search; 1 is greedy.
        max_samples: rows to evaluate, from the first; None means all.
        prompt: instruction of captions; None takes the one that the model was trained with.
        reading: how ScienceQA's letter is found: ``generation`` reads the generated text, ``likelihood``
            takes the letter among the choices that is the likeliest to come next.
        image_captions: put the shards' caption of the picture into ScienceQA's context; reported.
        tokenizer: of caption scores; ``simple`` needs no Java, and is not comparable with published numbers.
        dtype: compute dtype; ``auto`` takes the model's, or fp32 where bf16 is slow.
        language_model: where the decoder lies now; None takes the path it was trained with.
        vision_tower: where the tower lies now; None takes the path it was trained with.
        loss: also measure the loss a token over all references.
    """

    model: LocalPath
    data: LocalPath
    images: LocalPath | None = None
    references: LocalPath | None = None
    task: Literal["coco", "scienceqa"] = "coco"
    split: str | None = None
    output: LocalPath | None = None
    batch_size: Rows = 16
    max_new_tokens: Tokens | None = None
    min_new_tokens: AtLeastZero = 0
    num_beams: Beams = 1
    max_samples: Positive | None = None
    prompt: str | None = None
    reading: Literal["generation", "likelihood"] = "generation"
    image_captions: bool = False
    tokenizer: Literal["ptb", "simple"] = "ptb"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    language_model: LocalPath | None = None
    vision_tower: LocalPath | None = None
    loss: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        longest = self.max_new_tokens
        require(
            longest is None or self.min_new_tokens <= longest, "min_new_tokens is larger than max_new_tokens"
        )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Captions or answers from the shell.

    Attributes:
        model: run directory, checkpoint, adapter artifact or merged model directory.
        image: picture files, and folders of which all pictures are taken, by name; none asks without one.
        prompt: instruction or question; None takes the one that the model was trained with.
        choices: options of a ScienceQA question, in order; a model of that task needs them.
        hint: text that such a question is asked in the context of.
        output: file for a JSON object a line, ``-`` for the console; None prints texts alone.
        overwrite: replace ``output``.
        batch_size: rows decoded together.
        num_beams: hypotheses of beam search; 1 is greedy.
        stream: print words as they come, one picture at a time.
        max_new_tokens: longest answer in tokens; None takes 40 for captions, 8 for ScienceQA, 256 for chats.
        dtype: compute dtype; ``auto`` takes the model's, or fp32 where bf16 is slow.
        language_model: where the decoder lies now; None takes the path it was trained with.
        vision_tower: where the tower lies now; None takes the path it was trained with.
    """

    model: LocalPath
    image: list[LocalPath] = field(default_factory=list)
    prompt: str | None = None
    choices: list[str] = field(default_factory=list)
    hint: str | None = None
    output: LocalPath | None = None
    overwrite: bool = False
    batch_size: Rows = 8
    num_beams: Beams = 1
    stream: bool = False
    max_new_tokens: Tokens | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    language_model: LocalPath | None = None
    vision_tower: LocalPath | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        require(not self.stream or self.num_beams == 1, "stream prints words as they come; beams have none")
        require(not self.stream or self.output != "-", "stream and output - both write to the console")
        require(
            bool(self.image) or self.prompt is not None, "name pictures with --image, or ask with --prompt"
        )
        require(len(self.choices) != 1, "choices: a question has at least two")
