"""A run looked at before processes meet and weights load: files, sizes, steps, and its loaders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dehvf_ds.config import RunConfig, UserError
from dehvf_ds.data.collate import tokenizer_traits
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.loader import build_loader, build_validation_loader, epoch_samples, open_examples
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.data.tokenizer import check_tokenizer, load_tokenizer
from dehvf_ds.data.transforms import ImageTransform, build_image_transform
from dehvf_ds.distributed import World
from dehvf_ds.model import DehvfConfig, ModelError
from dehvf_ds.model.backbones import load_backbone_config
from dehvf_ds.model.weights import check_bases
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import build_model_config


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run whose configuration and files were looked at; nothing of it is loaded.

    Attributes:
        config: the run.
        world: this process's place.
        ds_config: the completed DeepSpeed configuration.
        model_config: the model's configuration.
        tokenizer: the language model's.
        transform: the vision tower's picture transform.
        index: the training shards.
        samples_per_epoch: rows that an epoch consumes.
        num_steps: optimizer steps of the whole run.
    """

    config: RunConfig
    world: World
    ds_config: dict[str, Any]
    model_config: DehvfConfig
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    index: ShardIndex
    samples_per_epoch: int
    num_steps: int

    def training_batches(self, start_sample: int, num_steps: int):
        """This rank's loader of ``num_steps`` steps from ``start_sample`` on."""
        return build_loader(
            self.config.data,
            self.tokenizer,
            self.transform,
            **self._place(),
            seed=self.config.seed,
            accumulation=self.config.train.accumulation(self.world.size),
            start_sample=start_sample,
            num_steps=num_steps,
        )

    def validation_batches(self):
        """This rank's loader of the validation rows; None where there are none."""
        if self.config.data.val is None:
            return None
        return build_validation_loader(self.config.data, self.tokenizer, self.transform, **self._place())

    def without_limit(self) -> Checked:
        """The same with rows of any length, to see how long what was cut is."""
        data = replace(self.config.data, max_tokens=2**20)
        return replace(self, config=replace(self.config, data=data))

    def _place(self) -> dict[str, int]:
        micro_batch_size = self.config.train.micro_batch_size
        return {"rank": self.world.rank, "world_size": self.world.size, "micro_batch_size": micro_batch_size}


def check(config: RunConfig, world: World) -> Checked:
    """Looks at all that can be wrong before processes meet and weights load.

    Raises:
        UserError: what is.
    """
    ds_config = read_deepspeed_json(config.deepspeed, config, world.size, world.local_size)
    for source, vision in ((config.model.language_model, False), (config.model.vision_tower, True)):
        try:
            # First: a directory that is not there is told as one, not as a hub id of a wrong form.
            load_backbone_config(source, vision=vision)
        except ModelError as error:
            raise UserError(f"model: {error}") from None
    transform = build_image_transform(config.model.vision_tower, config.model.image_size)
    model_config = build_model_config(
        config.model,
        image_size=transform.image_size,
        task=config.data.task,
        prompt=_caption_prompt(config),
    )
    longest = model_config.max_tokens
    if longest is not None and config.data.max_tokens > longest:
        raise UserError(
            f"data.max_tokens {config.data.max_tokens} is more than {config.model.language_model} has "
            f"positions for; set it to {longest} at most"
        )
    tokenizer = load_tokenizer(config.model.language_model)
    _check_bases(config, model_config, tokenizer, world)
    index, examples = open_examples(config.data, seed=config.seed)
    if config.data.val is not None:
        ShardIndex(config.data.val)
    if world.is_main:
        index.check_sizes()
    samples_per_epoch = epoch_samples(config.data, len(examples), config.train.global_batch_size)
    return Checked(
        config=config,
        world=world,
        ds_config=ds_config,
        model_config=model_config,
        tokenizer=tokenizer,
        transform=transform,
        index=index,
        samples_per_epoch=samples_per_epoch,
        num_steps=planned_steps(config, samples_per_epoch),
    )


def _caption_prompt(config: RunConfig) -> str | None:
    """The instruction that captions are trained with; an empty one is one."""
    if config.data.task != "caption":
        return None
    return CAPTION_PROMPT if config.data.prompt is None else config.data.prompt


def _check_bases(
    config: RunConfig, model_config: DehvfConfig, tokenizer: PreTrainedTokenizerBase, world: World
) -> None:
    tokenizer_traits(tokenizer)
    check_tokenizer(tokenizer, model_config.text_config.vocab_size)
    if world.is_main:
        try:
            check_bases(model_config, config.model.language_model, config.model.vision_tower)
        except ModelError as error:
            raise UserError(f"model: {error}") from None


def planned_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the run: ``train.steps``, or full batches in ``train.epochs`` passes.

    Args:
        config: the run.
        num_samples: samples that an epoch consumes.

    Raises:
        UserError: the data do not fill one batch.
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
