"""A training run: sizes, optimizer, schedule, and what is looked at in its middle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dehvf_ds.config.data import DataConfig
from dehvf_ds.config.errors import require
from dehvf_ds.config.kinds import (
    AtLeastZero,
    Beams,
    LocalPath,
    Minutes,
    Positive,
    PositiveNumber,
    Range,
    Rows,
    Share,
    ShareBelowOne,
    Tokens,
    check_ranges,
)
from dehvf_ds.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Sizes, optimizer and schedule of the run.

    Attributes:
        epochs: passes over the data; fractions are allowed. Ignored when ``steps`` is given.
        steps: number of optimizer steps.
        global_batch_size: rows of one optimizer step over all ranks.
        micro_batch_size: rows of one forward and backward on one rank; accumulation is derived.
        lr: peak learning rate (AdamW).
        min_lr_ratio: the cosine's end, as a share of ``lr``.
        warmup_steps: optimizer steps of linear warm-up.
        betas: AdamW's moment decays.
        weight_decay: decoupled weight decay; applied to matrices only.
        max_grad_norm: global norm that gradients are clipped to; 0 switches clipping off.
        activation_checkpointing: recompute LLM layers in backward (non-reentrant).
        max_bad_steps: non-finite steps in a row after which the run stops.
        save_every: optimizer steps between checkpoints; 0 keeps none but that of a run asked to stop.
        keep_checkpoints: newest checkpoints that are kept, beside the best.
        max_failed_saves: checkpoints in a row that could not be written after which the run stops.
        eval_every: optimizer steps between validations on ``data.val``; 0 validates at the end only.
        levels_every: optimizer steps between the numbers of level weights and gains; 0 leaves them out.
        timeout_minutes: how long a rank waits for a silent other in training before the job fails.
        start_timeout_minutes: the same until training begins: in ZeRO-3 all wait while one reads the weights.
        log_every: optimizer steps between plain log lines when the console is not a terminal.
        trackers: experiment trackers by accelerate's names: tensorboard, wandb, mlflow, swanlab, ...
    """

    epochs: PositiveNumber = 1.0
    steps: Positive | None = None
    global_batch_size: Rows = 32
    micro_batch_size: Rows = 16
    lr: Annotated[float, Range(0, 100, open_low=True)] = 2e-3
    min_lr_ratio: Share = 0.0
    warmup_steps: AtLeastZero = 20
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    weight_decay: Annotated[float, Range(0, 100)] = 0.02
    max_grad_norm: Annotated[float, Range(0, 10**6)] = 1.0
    activation_checkpointing: bool = False
    max_bad_steps: Positive = 5
    save_every: AtLeastZero = 0
    keep_checkpoints: Positive = 2
    max_failed_saves: Positive = 3
    eval_every: AtLeastZero = 0
    levels_every: AtLeastZero = 50
    timeout_minutes: Minutes = 30.0
    start_timeout_minutes: Minutes = 30.0
    log_every: Positive = 10
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_ranges(self, "train.")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {self.micro_batch_size}",
        )

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step on ``world_size`` ranks.

        Raises:
            UserError: the global batch does not divide into micro-batches over these ranks.
        """
        rows = self.micro_batch_size * world_size
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{self.micro_batch_size} x {world_size} ranks; set train.micro_batch_size to a divisor of "
            f"{self.global_batch_size / world_size:g}",
        )
        return self.global_batch_size // rows


@dataclass(frozen=True, kw_only=True)
class InsideConfig:
    """Answers and scores in the middle of the run, by a whole copy of the model on every rank.

    Attributes:
        every_steps: optimizer steps between evaluations, with one at the end; 0 evaluates nothing.
        data: directory of evaluation shards; None takes ``data.val``.
        max_samples: rows to ask, from the first.
        batch_size: rows answered together on one rank.
        max_new_tokens: longest answer in tokens; None means 40 for captions and 8 for ScienceQA.
        num_beams: hypotheses of beam search; 1 is greedy.
        tokenizer: of caption scores; ``simple`` needs no Java, and is not comparable with published numbers.
    """

    every_steps: AtLeastZero = 0
    data: LocalPath | None = None
    max_samples: Positive = 256
    batch_size: Rows = 16
    max_new_tokens: Tokens | None = None
    num_beams: Beams = 1
    tokenizer: Literal["ptb", "simple"] = "ptb"

    def __post_init__(self) -> None:
        check_ranges(self, "eval.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Attributes:
        run_dir: directory that the run writes; created.
        model: backbones and branch.
        data: shards and tokens.
        train: sizes and optimizer.
        eval: answers and scores in the middle of the run.
        seed: seed of initial values, order and augmentation.
        deepspeed: path of the DeepSpeed JSON.
        overwrite: empty ``run_dir`` where it holds another run; without it such a directory is refused.
        resume: ``auto`` goes on from the run directory's newest checkpoint, if there is one; ``never``; or a
            checkpoint's path.
        init_from: run directory or adapter artifact whose trained weights a new run starts from.
        dry_run: check everything, read a batch of each set, take a step of a scaled-down copy; write nothing.
    """

    run_dir: LocalPath
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: InsideConfig = field(default_factory=InsideConfig)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    deepspeed: LocalPath = "ds_configs/zero3.json"
    overwrite: bool = False
    resume: LocalPath = "auto"
    init_from: LocalPath | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.eval.every_steps:
            require(self.data.task != "chat", "eval.every_steps: data.task chat has no scores; leave it 0")
            require(
                self.eval.data is not None or self.data.val is not None,
                "eval.every_steps needs rows to ask: give eval.data or data.val",
            )
