"""Evaluations of a model, in and after its training, and captions from the shell."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dehvf_ds.config.values import CHECKS, AtLeastZero, LocalPath, Positive, require

Beams = Annotated[Positive, Field(description="hypotheses of beam search; 1 is greedy")]
BackbonePath = Annotated[LocalPath | None, Field(description="where it is now; None: as in training")]


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class InTrainingConfig:
    """In-training evaluation: answers and scores, by a full copy of the model on every rank."""

    every_steps: AtLeastZero = 0
    """optimizer steps between evaluations, with one at the end; 0 evaluates nothing"""
    data: LocalPath | None = None
    """directory of evaluation shards; None takes data.val"""
    max_samples: Positive = 256
    """rows to ask, from the first"""
    batch_size: Positive = 16
    """rows answered together on one rank"""
    max_new_tokens: Positive | None = None
    """longest answer in tokens; None takes 40 for captions, 8 for ScienceQA, 256 for chats"""
    num_beams: Beams = 1
    tokenizer: Literal["ptb", "simple"] = "ptb"
    """of caption scores; simple needs no Java; its numbers are not comparable with published ones"""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class EvalConfig:
    """One evaluation of a trained model."""

    model: LocalPath
    """run directory, checkpoint, adapter artifact or merged model directory"""
    data: LocalPath
    """directory of shards, or as published: ScienceQA's directory, COCO's or Karpathy's JSON file"""
    images: LocalPath | None = None
    """directory of the pictures of such a JSON file; None takes the file's own"""
    references: LocalPath | None = None
    """COCO's or Karpathy's JSON file to score captions against, by file name; None takes the shards' own"""
    task: Literal["caption", "scienceqa"] = "caption"
    """what is scored: captions, or answers to ScienceQA"""
    split: str | None = None
    """name of the split in the output; None takes the name of data"""
    output: LocalPath | None = None
    """where TASK-SPLIT/ is written; None means eval/ of the run"""
    batch_size: Positive = 16
    """rows decoded together on one rank"""
    max_new_tokens: Positive | None = None
    """longest answer in tokens; None takes 40 for captions, 8 for ScienceQA, 256 for chats"""
    min_new_tokens: AtLeastZero = 0
    """shortest answer in tokens"""
    num_beams: Beams = 1
    max_samples: Positive | None = None
    """rows to evaluate, from the first; None means all"""
    prompt: str | None = None
    """instruction of captions; None takes the one that the model was trained with"""
    reading: Literal["generation", "likelihood"] = "generation"
    """how ScienceQA's letter is found: in the generated text, or as the likeliest of the choices' letters"""
    image_captions: bool = False
    """put the shards' caption of the picture into ScienceQA's context; reported"""
    tokenizer: Literal["ptb", "simple"] = "ptb"
    """of caption scores; simple needs no Java; its numbers are not comparable with published ones"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute dtype; auto takes the model's, or fp32 where bf16 is slow"""
    language_model: BackbonePath = None
    vision_tower: BackbonePath = None
    loss: bool = False
    """also measure the loss a token over all references"""

    def __post_init__(self) -> None:
        fits = self.min_new_tokens <= (self.max_new_tokens or self.min_new_tokens)
        require(fits, "min_new_tokens is larger than max_new_tokens")
        if self.task == "caption":
            require(self.reading == "generation", "reading likelihood is ScienceQA's; captions are generated")
            require(not self.image_captions, "image_captions applies to ScienceQA, not to task caption")
        else:
            require(self.references is None, "references apply to captions, not to task scienceqa")
        fits = self.images is None or self.data.lower().endswith(".json")
        require(fits, "images applies to annotation files, and data is none")


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class GenerateConfig:
    """Captions or answers from the shell."""

    model: LocalPath
    """run directory, checkpoint, adapter artifact or merged model directory"""
    image: list[LocalPath] = field(default_factory=list)
    """picture files, and folders of which all pictures are taken, by name; none asks without one"""
    prompt: str | None = None
    """instruction or question; None takes the one that the model was trained with"""
    choices: list[str] = field(default_factory=list)
    """options of a ScienceQA question, in order; a model of that task needs them"""
    hint: str | None = None
    """text that such a question is asked in the context of"""
    output: LocalPath | None = None
    """file for a JSON object a line, - for the console; None prints texts alone"""
    overwrite: bool = False
    """replace output"""
    batch_size: Positive = 8
    """rows decoded together"""
    num_beams: Beams = 1
    stream: bool = False
    """print words as they come, one picture at a time"""
    max_new_tokens: Positive | None = None
    """longest answer in tokens; None takes 40 for captions, 8 for ScienceQA, 256 for chats"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute dtype; auto takes the model's, or fp32 where bf16 is slow"""
    language_model: BackbonePath = None
    vision_tower: BackbonePath = None

    def __post_init__(self) -> None:
        require(not self.stream or self.num_beams == 1, "stream prints words as they come; beams have none")
        require(not self.stream or self.output != "-", "stream and output - both write to the console")
        asked = bool(self.image) or self.prompt is not None
        require(asked, "name pictures with --image, or ask with --prompt")
        require(len(self.choices) != 1, "choices: a question has at least two")
