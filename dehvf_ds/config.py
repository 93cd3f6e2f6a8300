"""What a run is made of: frozen dataclasses, their cross-field checks, YAML and flags.

One owner per number: this configuration owns batch sizes, learning rate, steps and data; the JSON
given by ``--deepspeed`` owns memory, precision and communication (DESIGN of the repository, README).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

ConfigT = TypeVar("ConfigT")

RECIPES_DIR = Path(__file__).parent / "recipes"

SWITCHES = ("--dry_run", "--overwrite")
"""Flags that mean true where no value follows."""


class UserError(Exception):
    """A mistake in what the user gave us. Entries print its one line and exit with code 2."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters inside every FFN of the frozen LLM.

    Attributes:
        rank: LoRA rank; 0 switches the adapters off.
        alpha: LoRA alpha; the delta is scaled by ``alpha / rank``.
        dropout: dropout probability on the adapters' input.
        targets: names of the FFN's linear maps that get an adapter.
    """

    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("down_proj",)

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "model.lora.rank must be at least 0")
        _require(0 <= self.dropout < 1, "model.lora.dropout must lie in [0, 1)")
        _require(self.rank == 0 or len(self.targets) > 0, "model.lora.targets names no linear map")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbones and the branch between them.

    Attributes:
        language_model: local directory or hub id of an HF decoder.
        vision_tower: local directory or hub id of an HF vision tower.
        fusion: ``ffn`` DEHVF; ``prefix`` projected patches before the text; ``none`` text only.
        router: how a layer weighs the vision levels: ``layer``, ``static`` or ``last``.
        num_levels: number of vision levels, evenly spaced, the last block included.
        levels: vision levels by block number (1 is the first block); overrides ``num_levels``.
        rank: width of the visual memory.
        router_dim: width of the router's queries and keys.
        image_size: side of the square picture in pixels; None takes what the tower's processor makes.
        prefix_tokens: visual tokens of ``fusion: prefix``, pooled from the patches; None keeps all.
        lora: the FFN adapters.
    """

    language_model: str
    vision_tower: str
    fusion: Literal["ffn", "prefix", "none"] = "ffn"
    router: Literal["layer", "static", "last"] = "layer"
    num_levels: int = 6
    levels: tuple[int, ...] | None = None
    rank: int = 96
    router_dim: int = 32
    image_size: int | None = None
    prefix_tokens: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _require(self.num_levels >= 1, "model.num_levels must be at least 1")
        _require(self.rank >= 1, "model.rank must be at least 1")
        _require(self.router_dim >= 1, "model.router_dim must be at least 1")
        if self.levels is not None:
            _require(len(self.levels) > 0, "model.levels is empty")
            _require(
                list(self.levels) == sorted(set(self.levels)) and min(self.levels) >= 1,
                "model.levels must be rising block numbers, 1 the first",
            )


@dataclass(frozen=True, kw_only=True)
class ScienceqaConfig:
    """What of a ScienceQA problem is shown and what is to be answered; the defaults are QCM-A.

    Attributes:
        image_captions: put the shards' caption of the picture into the context (off in training and on in
            evaluation at MemVP and ADEM-VL; one flag for both here).
        lecture: the target goes on with the lecture; with ``solution`` this is QCM-ALE.
        solution: the target goes on with the solution.
    """

    image_captions: bool = False
    lecture: bool = False
    solution: bool = False


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random views of a training picture, drawn anew for (seed, epoch, sample).

    Attributes:
        min_crop: smallest share of the picture's area that a random resized crop keeps; 1 switches it off.
        flip: probability of a horizontal flip. Captions that tell left from right become wrong by it.
    """

    min_crop: float = 1.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.min_crop <= 1, "data.augment.min_crop must lie in (0, 1]")
        _require(0 <= self.flip <= 1, "data.augment.flip must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become token ids.

    Attributes:
        train: directory of the training shards' ``manifest.json`` and index, and of the shards themselves
            unless ``location`` says otherwise.
        location: where the shards lie if not in ``train``: a directory, an ``http(s)://`` address, or a
            ``pipe:`` command that writes the shard to its output, with ``{}`` for its name.
        cache_dir: directory on a fast local disk that shards are copied to before they are read.
        cache_gb: largest size of ``cache_dir`` in GB (1e9 bytes); the longest unused shards leave first.
        task: ``caption``, ``scienceqa`` or ``chat``; chooses prompt and target.
        prompt: the instruction before a caption; None takes the task's own.
        captions: ``all`` makes one sample of every caption of a picture; ``one`` draws one caption an epoch.
        scienceqa: form of ScienceQA's prompt and target.
        augment: random crops and flips.
        max_tokens: longest row in tokens; longer targets are cut.
        shuffle_window: samples of a stream among which the order is drawn.
        bucket_steps: optimizer steps among which rows change places so that a step's rows are of similar
            length; 0 keeps the drawn order.
        tail: an epoch's rows that do not fill a batch: ``wrap`` fills it with the next epoch's first,
            ``drop`` leaves them out of this epoch.
        on_bad: a damaged sample: ``raise`` stops the run, ``replace`` puts another of its shard in its place.
        max_bad_share: with ``replace``, share of replaced samples (after the first 1,000) that stops the run.
        num_workers: loader processes a rank.
        val: directory of validation shards; None validates nothing.
        val_samples: captions, problems or chats of ``val`` to take, from the first; 0 means all.
    """

    train: str
    location: str | None = None
    cache_dir: str | None = None
    cache_gb: float = 100.0
    task: Literal["caption", "scienceqa", "chat"] = "caption"
    prompt: str | None = None
    captions: Literal["all", "one"] = "all"
    scienceqa: ScienceqaConfig = field(default_factory=ScienceqaConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_tokens: int = 128
    shuffle_window: int = 4096
    bucket_steps: int = 0
    tail: Literal["wrap", "drop"] = "wrap"
    on_bad: Literal["raise", "replace"] = "raise"
    max_bad_share: float = 0.01
    num_workers: int = 2
    val: str | None = None
    val_samples: int = 0

    def __post_init__(self) -> None:
        _require(self.val_samples >= 0, "data.val_samples must be at least 0")
        _require(self.cache_gb > 0, "data.cache_gb must be positive")
        _require(self.max_tokens >= 8, "data.max_tokens must be at least 8")
        _require(self.shuffle_window >= 1, "data.shuffle_window must be at least 1")
        _require(self.bucket_steps >= 0, "data.bucket_steps must be at least 0")
        _require(0 <= self.max_bad_share < 1, "data.max_bad_share must lie in [0, 1)")
        _require(self.num_workers >= 0, "data.num_workers must be at least 0")


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
        eval_every: optimizer steps between validations on ``data.val``; 0 validates at the end only.
        levels_every: optimizer steps between the numbers of level weights and gains; 0 leaves them out.
        timeout_minutes: how long a rank waits for a silent other before the job fails.
        log_every: optimizer steps between plain log lines when the console is not a terminal.
    """

    epochs: float = 1.0
    steps: int | None = None
    global_batch_size: int = 32
    micro_batch_size: int = 16
    lr: float = 2e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    max_bad_steps: int = 5
    save_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 0
    levels_every: int = 50
    timeout_minutes: float = 30.0
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs must be positive")
        _require(self.steps is None or self.steps >= 1, "train.steps must be at least 1")
        _require(self.micro_batch_size >= 1, "train.micro_batch_size must be at least 1")
        _require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {self.micro_batch_size}",
        )
        _require(self.lr > 0, "train.lr must be positive")
        _require(self.warmup_steps >= 0, "train.warmup_steps must be at least 0")
        _require(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio must lie in [0, 1]")
        _require(self.max_bad_steps >= 1, "train.max_bad_steps must be at least 1")
        _require(self.keep_checkpoints >= 1, "train.keep_checkpoints must be at least 1")
        _require(self.log_every >= 1, "train.log_every must be at least 1")
        _require(self.timeout_minutes > 0, "train.timeout_minutes must be positive")
        for name in ("save_every", "eval_every", "levels_every"):
            _require(getattr(self, name) >= 0, f"train.{name} must be at least 0")

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step on ``world_size`` ranks.

        Raises:
            UserError: the global batch does not divide into micro-batches over these ranks.
        """
        rows = self.micro_batch_size * world_size
        _require(
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

    every_steps: int = 0
    data: str | None = None
    max_samples: int = 256
    batch_size: int = 16
    max_new_tokens: int | None = None
    num_beams: int = 1
    tokenizer: Literal["ptb", "simple"] = "ptb"

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, "eval.every_steps must be at least 0")
        for name in ("max_samples", "batch_size", "num_beams"):
            _require(getattr(self, name) >= 1, f"eval.{name} must be at least 1")
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "eval.max_new_tokens must be at least 1"
        )


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

    run_dir: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: InsideConfig = field(default_factory=InsideConfig)
    seed: int = 0
    deepspeed: str = "ds_configs/zero3.json"
    overwrite: bool = False
    resume: str = "auto"
    init_from: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.eval.every_steps:
            _require(self.data.task != "chat", "eval.every_steps: data.task chat has no scores; leave it 0")
            _require(
                self.eval.data is not None or self.data.val is not None,
                "eval.every_steps needs rows to ask: give eval.data or data.val",
            )


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

    model: str
    data: str
    images: str | None = None
    references: str | None = None
    task: Literal["coco", "scienceqa"] = "coco"
    split: str | None = None
    output: str | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    num_beams: int = 1
    max_samples: int | None = None
    prompt: str | None = None
    reading: Literal["generation", "likelihood"] = "generation"
    image_captions: bool = False
    tokenizer: Literal["ptb", "simple"] = "ptb"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    language_model: str | None = None
    vision_tower: str | None = None
    loss: bool = False

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size must be at least 1")
        longest = self.max_new_tokens
        _require(longest is None or longest >= 1, "max_new_tokens must be at least 1")
        _require(self.min_new_tokens >= 0, "min_new_tokens must be at least 0")
        _require(
            longest is None or self.min_new_tokens <= longest, "min_new_tokens is larger than max_new_tokens"
        )
        _require(self.num_beams >= 1, "num_beams must be at least 1")
        _require(self.max_samples is None or self.max_samples >= 1, "max_samples must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Captions or answers from the shell.

    Attributes:
        model: run directory, adapter artifact or merged model directory.
        image: one or more picture files.
        prompt: instruction or question; None takes the one that the model was trained with.
        max_new_tokens: longest answer in tokens.
        dtype: compute dtype; ``auto`` takes the model's, or fp32 where bf16 is slow.
        language_model: where the decoder lies now; None takes the path it was trained with.
        vision_tower: where the tower lies now; None takes the path it was trained with.
    """

    model: str
    image: list[str]
    prompt: str | None = None
    max_new_tokens: int = 40
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    language_model: str | None = None
    vision_tower: str | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")


def parse_run_config(args: Sequence[str], default_recipe: str = "demo") -> RunConfig:
    """Parses flags and an optional YAML (``--config``) into a checked configuration.

    Flags win over the file. ``--config`` takes a path or the name of a packaged recipe; without it the
    recipe ``default_recipe`` is taken.

    Raises:
        UserError: unknown key, wrong type, a missing file, values that contradict each other.
    """
    return _parse(RunConfig, _resolve_recipe(args, default_recipe), "Trains DEHVF on DeepSpeed.")


def parse_eval_config(args: Sequence[str]) -> EvalConfig:
    """Parses the flags of ``eval.py``, or a YAML of them. Raises ``UserError`` as ``parse_run_config``."""
    return _parse(EvalConfig, args, "Evaluates a trained DEHVF model.")


def parse_generate_config(args: Sequence[str]) -> GenerateConfig:
    """Parses the flags of ``generate.py``. Raises ``UserError`` as ``parse_run_config``."""
    return _parse(GenerateConfig, args, "Describes pictures with a trained DEHVF model.")


def save_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML that ``--config`` takes back."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")


def load_run_config(path: Path) -> RunConfig:
    """Reads what ``save_run_config`` wrote.

    Raises:
        UserError: the file is missing or is not a run's configuration.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this a run directory?")
    return parse_run_config(["--config", str(path)])


def to_plain(value: Any) -> Any:
    """Turns dataclasses and tuples into dictionaries and lists, for YAML and JSON."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def _parse(config_class: type[ConfigT], args: Sequence[str], description: str) -> ConfigT:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; for training also a recipe's name")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; ignored")
    parser.add_class_arguments(config_class)
    try:
        namespace = parser.instantiate(parser.parse_args(_normalized(args)))
    except (ArgumentError, TypeError, yaml.YAMLError) as error:
        raise UserError(" ".join(str(error).split())) from None
    return config_class(**{field.name: namespace[field.name] for field in fields(config_class)})  # pyright: ignore[reportArgumentType]


def _normalized(args: Sequence[str]) -> list[str]:
    """Takes ``--dry-run`` for ``--dry_run true``: dashes in names, and a switch without a value."""
    result: list[str] = []
    for number, arg in enumerate(args):
        if not arg.startswith("--"):
            result.append(arg)
            continue
        name, separator, value = arg.partition("=")
        name = "--" + name.removeprefix("--").replace("-", "_")
        result.append(name + separator + value)
        bare = not separator and (number + 1 == len(args) or args[number + 1].startswith("--"))
        if bare and name in SWITCHES:
            result[-1] = f"{name}=true"
    return result


def _resolve_recipe(args: Sequence[str], default_recipe: str) -> list[str]:
    """Puts the recipe's path in the place of its name, and the default recipe where none is named."""
    resolved = list(args)
    for i, arg in enumerate(resolved):
        name = arg.removeprefix("--config=") if arg.startswith("--config=") else None
        if arg == "--config" and i + 1 < len(resolved):
            resolved[i + 1] = _recipe_path(resolved[i + 1])
            return resolved
        if name is not None:
            resolved[i] = f"--config={_recipe_path(name)}"
            return resolved
    return ["--config", _recipe_path(default_recipe), *resolved]


def _recipe_path(name: str) -> str:
    packaged = RECIPES_DIR / f"{name}.yaml"
    if packaged.is_file():
        return str(packaged)
    if not Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
        raise UserError(f"--config {name}: no such file, nor a recipe; recipes: {known}")
    return name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
