"""A run resolved before ranks connect and weights load: its files read, its sizes and steps known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dehvf_ds.config import RunConfig, UserError
from dehvf_ds.data.collate import (
    ImageTransform,
    build_image_transform,
    check_tokenizer,
    load_tokenizer,
)
from dehvf_ds.data.examples import Examples, open_examples
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import (
    TrainingLoader,
    build_loader,
    build_validation_loader,
    epoch_samples,
    open_validation,
)
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.backbones import check_bases, load_backbone_config
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import build_model_config
from dehvf_ds.training.metrics import check_trackers


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run whose configuration and files were read and checked; no weights are loaded.

    ``samples_per_epoch`` are the rows that an epoch consumes; ``num_steps`` the optimizer steps of the run.
    """

    config: RunConfig
    world: World
    ds_config: dict[str, Any]
    model_config: DehvfConfig
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    examples: Examples
    validation: Examples | None
    samples_per_epoch: int
    num_steps: int

    @property
    def index(self) -> ShardIndex:
        """Index of the training shards."""
        return self.examples.index

    def training_batches(
        self, start_sample: int, num_steps: int, *, pin_memory: bool = False
    ) -> TrainingLoader:
        """This rank's loader of ``num_steps`` steps from ``start_sample`` on."""
        return build_loader(
            self.config.data,
            self.examples,
            self.tokenizer,
            self.transform,
            **self._per_rank(),
            seed=self.config.seed,
            accumulation=self.config.train.accumulation(self.world.size),
            start_sample=start_sample,
            num_steps=num_steps,
            pin_memory=pin_memory,
        )

    def validation_batches(self) -> TrainingLoader | None:
        """This rank's loader of the validation rows; None where there are none."""
        if self.validation is None:
            return None
        return build_validation_loader(
            self.config.data, self.validation, self.tokenizer, self.transform, **self._per_rank()
        )

    def notes(self) -> list[str]:
        """Settings that do not have the effect that one would expect."""
        train, data, notes = self.config.train, self.config.data, []
        if train.warmup_steps >= self.num_steps:
            notes.append(
                f"train.warmup_steps {train.warmup_steps} is not less than the run's {self.num_steps} steps, "
                f"so the learning rate never reaches train.lr {train.lr:g}"
            )
        if data.captions_together > 1 and len(self.examples) == len(self.index):
            notes.append(
                f"data.captions_together {data.captions_together} has no effect: no row of {data.train} has "
                "more than one caption"
            )
        return notes

    def _per_rank(self) -> dict[str, int]:
        micro_batch_size = self.config.train.micro_batch_size
        return {"rank": self.world.rank, "world_size": self.world.size, "micro_batch_size": micro_batch_size}


def resolve(config: RunConfig, world: World) -> ResolvedRun:
    """Reads and checks everything that can be wrong with a run before ranks connect and weights load."""
    ds_config = read_deepspeed_json(config.deepspeed, config, world.size, world.local_size)
    check_trackers(config.train.trackers)
    model, data = config.model, config.data
    try:
        # First: a missing directory is reported as such, not as a malformed hub id.
        load_backbone_config(model.language_model, vision=False)
        load_backbone_config(model.vision_tower, vision=True)
    except ModelError as error:
        raise UserError(f"model: {error}") from None
    transform = build_image_transform(model.vision_tower, model.image_size)
    prompt = CAPTION_PROMPT if data.prompt is None else data.prompt
    model_config = build_model_config(
        model,
        image_size=transform.image_size,
        task=data.task,
        prompt=prompt if data.task == "caption" else None,
    )
    longest = model_config.max_tokens
    if longest is not None and data.max_tokens > longest:
        raise UserError(
            f"data.max_tokens {data.max_tokens} is more than {model.language_model} has positions for; "
            f"set it to {longest} at most"
        )
    tokenizer = load_tokenizer(model.language_model)
    check_tokenizer(tokenizer, model_config.text_config.vocab_size)
    if world.is_main:
        try:
            check_bases(model_config, model.language_model, model.vision_tower)
        except ModelError as error:
            raise UserError(f"model: {error}") from None
    examples = open_examples(data, seed=config.seed)
    validation = open_validation(data)
    if world.is_main:
        examples.index.check_sizes()
    samples_per_epoch = epoch_samples(data, len(examples), config.train.global_batch_size)
    return ResolvedRun(
        config=config,
        world=world,
        ds_config=ds_config,
        model_config=model_config,
        tokenizer=tokenizer,
        transform=transform,
        examples=examples,
        validation=validation,
        samples_per_epoch=samples_per_epoch,
        num_steps=planned_steps(config, samples_per_epoch),
    )


def planned_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the run: ``train.steps``, or the full batches in ``train.epochs`` passes over
    ``num_samples``.
    """
    if config.train.steps is not None:
        return config.train.steps
    steps = int(config.train.epochs * num_samples) // config.train.global_batch_size
    if steps == 0:
        raise UserError(
            f"{config.data.train}: {num_samples} samples x {config.train.epochs:g} epochs do not fill one "
            f"batch of train.global_batch_size {config.train.global_batch_size}"
        )
    return steps
