"""What a training run is made of. A field's type says what a setting takes, the text below it is its help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dehvf_ds.config.evaluation import InTrainingConfig
from dehvf_ds.config.values import (
    CHECKS,
    AtLeastZero,
    Listed,
    LocalPath,
    Positive,
    PositiveNumber,
    Share,
    ShareBelowOne,
    require,
    settings_of,
)


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class LoraConfig:
    """LoRA adapters inside every FFN of the frozen LLM."""

    rank: AtLeastZero = 4
    """LoRA rank; 0 switches the adapters off"""
    alpha: PositiveNumber = 8.0
    """LoRA alpha; the delta is scaled by alpha / rank"""
    dropout: ShareBelowOne = 0.0
    """dropout probability on the adapters' input"""
    targets: Annotated[tuple[str, ...], Listed] = ("down_proj",)
    """names of the FFN's linear maps that get an adapter"""

    def __post_init__(self) -> None:
        require(self.rank == 0 or len(self.targets) > 0, "model.lora.targets names no linear map")


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class ModelConfig:
    """The frozen backbones and the branch between them."""

    language_model: LocalPath
    """local directory or hub id of a Hugging Face decoder"""
    vision_tower: LocalPath
    """local directory or hub id of a Hugging Face vision tower"""
    fusion: Literal["ffn", "prefix", "none"] = "ffn"
    """ffn is DEHVF; prefix puts projected patches before the text; none is text only"""
    router: Literal["layer", "static", "last"] = "layer"
    """how an LLM layer weighs the tower's feature layers"""
    num_feature_layers: Positive = 6
    """number of feature layers, evenly spaced, the last block included"""
    feature_layers: Annotated[tuple[Positive, ...] | None, Listed] = None
    """feature layers by block number (1 is the first block); overrides num_feature_layers"""
    rank: Positive = 96
    """width of the visual memory"""
    router_dim: Positive = 32
    """width of the router's queries and keys"""
    image_size: Positive | None = None
    """side of the square picture in pixels; None takes what the tower's processor makes"""
    prefix_tokens: Positive | None = None
    """visual tokens of fusion prefix, pooled from the patches; None keeps all"""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        trained = self.fusion != "none" or self.lora.rank > 0
        require(trained, "model.fusion none with model.lora.rank 0 leaves nothing to train; set one of them")
        layers = self.feature_layers
        rising = layers is None or (layers and list(layers) == sorted(set(layers)))
        require(bool(rising), "model.feature_layers must be rising block numbers, 1 the first")


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class ScienceqaConfig:
    """What of a ScienceQA problem is shown and what is to be answered; the defaults are QCM-A."""

    image_captions: bool = False
    """put the shards' caption of the picture into the context (MemVP and ADEM-VL: in evaluation only)"""
    lecture: bool = False
    """the target goes on with the lecture; with solution this is QCM-ALE"""
    solution: bool = False
    """the target goes on with the solution"""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class AugmentConfig:
    """Random views of a training picture, drawn anew for (seed, epoch, sample)."""

    min_crop: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """smallest share of the picture's area that a random resized crop keeps; 1 switches it off"""
    flip: Share = 0.0
    """probability of a horizontal flip; it makes captions that tell left from right wrong"""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class DataConfig:
    """Where samples come from and how they become token ids."""

    train: LocalPath
    """directory of the training shards' manifest.json and index, and of the shards unless location is set"""
    location: LocalPath | None = None
    """where the shards lie if not in train: a directory, an address (https://, s3://), or a pipe: command"""
    cache_dir: LocalPath | None = None
    """directory on a fast local disk that shards are copied to before they are read"""
    cache_gb: PositiveNumber = 100.0
    """largest size of cache_dir in GB (1e9 bytes); the least recently used shards leave first"""
    task: Literal["caption", "scienceqa", "chat"] = "caption"
    """chooses prompt and target"""
    prompt: str | None = None
    """the instruction before a caption; None takes the task's own"""
    captions: Literal["all", "one"] = "all"
    """all makes one sample of every caption of a picture; one draws one caption an epoch"""
    scienceqa: ScienceqaConfig = field(default_factory=ScienceqaConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_tokens: Annotated[int, Field(ge=8, le=2**20)] = 128
    """longest row in tokens; longer targets are cut"""
    shuffle_window: Positive = 4096
    """samples of a stream among which the order is drawn"""
    bucket_steps: AtLeastZero = 0
    """optimizer steps among which rows are sorted into steps of similar length; 0 keeps the drawn order"""
    tail: Literal["wrap", "drop"] = "wrap"
    """an epoch's last, partial batch: wrap fills it with the next epoch's first rows, drop leaves it out"""
    on_bad: Literal["raise", "substitute"] = "raise"
    """a damaged sample: raise stops the run, substitute takes another of its shard"""
    max_bad_share: ShareBelowOne = 0.01
    """with on_bad substitute, share of substituted samples (after the first 1,000) that stops the run"""
    num_workers: Annotated[int, Field(ge=0, le=256)] = 2
    """loader processes a rank"""
    val: LocalPath | None = None
    """directory of validation shards; None validates nothing"""
    val_samples: AtLeastZero = 0
    """captions, problems or chats of val to take, from the first; 0 means all"""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class TrainConfig:
    """Sizes, optimizer and schedule of the run."""

    epochs: PositiveNumber = 1.0
    """passes over the data; fractions are allowed; ignored when steps is given"""
    steps: Positive | None = None
    """number of optimizer steps"""
    global_batch_size: Positive = 32
    """rows of one optimizer step over all ranks"""
    micro_batch_size: Positive = 16
    """rows of one forward and backward on one rank; accumulation is derived"""
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-3
    """peak learning rate (AdamW)"""
    min_lr_ratio: Share = 0.0
    """the cosine's end, as a share of lr"""
    warmup_steps: AtLeastZero = 20
    """optimizer steps of linear warm-up"""
    betas: Annotated[tuple[ShareBelowOne, ShareBelowOne], Listed] = (0.9, 0.95)
    """AdamW's moment decays"""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.02
    """decoupled weight decay; applied to matrices only"""
    max_grad_norm: Annotated[float, Field(ge=0, le=10**6)] = 1.0
    """global norm that gradients are clipped to; 0 switches clipping off"""
    activation_checkpointing: bool = False
    """recompute LLM layers in backward (non-reentrant)"""
    max_bad_steps: Positive = 5
    """non-finite steps in a row after which the run stops"""
    save_every: AtLeastZero = 0
    """optimizer steps between checkpoints; 0 keeps none but that of a run asked to stop"""
    keep_checkpoints: Positive = 2
    """newest checkpoints that are kept, beside the best"""
    max_failed_saves: Positive = 3
    """checkpoints in a row that could not be written after which the run stops"""
    validate_every: AtLeastZero = 0
    """optimizer steps between validations on data.val; 0 validates at the end only"""
    router_every: AtLeastZero = 50
    """optimizer steps between records of the fuser's layer weights and scales; 0 leaves them out"""
    timeout_minutes: PositiveNumber = 30.0
    """how long a rank waits for a silent other in training before the job fails"""
    start_timeout_minutes: PositiveNumber = 30.0
    """the same until training begins: in ZeRO-3 all wait while one reads the weights"""
    log_every: Positive = 10
    """optimizer steps between plain log lines when the console is not a terminal"""
    trackers: Annotated[tuple[str, ...], Listed] = ("tensorboard",)
    """experiment trackers by accelerate's names: tensorboard, wandb, mlflow, swanlab, ..."""

    def __post_init__(self) -> None:
        self.accumulation(1)

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step; refuses a number of ranks that the global batch does not fit."""
        rows = self.micro_batch_size * world_size
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{self.micro_batch_size} x {world_size} ranks; set train.micro_batch_size to a divisor of "
            f"{self.global_batch_size / world_size:g}",
        )
        return self.global_batch_size // rows


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class RunConfig:
    """One training run."""

    run_dir: LocalPath
    """directory that the run writes; created"""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: InTrainingConfig = field(default_factory=InTrainingConfig)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """seed of initial values, order and augmentation"""
    deepspeed: LocalPath = "ds_configs/zero3.json"
    """path of the DeepSpeed JSON, or the name of a shipped one"""
    overwrite: bool = False
    """empty run_dir where it holds another run; without it such a directory is refused"""
    resume: LocalPath = "auto"
    """auto goes on from the newest checkpoint of run_dir, if it has one; never; or a checkpoint's path"""
    init_from: LocalPath | None = None
    """run directory or adapter artifact whose trained weights a new run starts from"""
    dry_run: bool = False
    """check everything, read a batch of each set, take a step of a scaled-down copy; write nothing"""

    def __post_init__(self) -> None:
        if self.eval.every_steps:
            require(self.data.task != "chat", "eval.every_steps: data.task chat has no scores; leave it 0")
            given = self.eval.data is not None or self.data.val is not None
            require(given, "eval.every_steps needs rows to ask: give eval.data or data.val")


# A setting, the values of it beside which others change nothing, and those others.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("model.fusion", lambda fusion: fusion != "prefix", "model.prefix_tokens"),
    ("model.fusion", lambda fusion: fusion != "ffn", "model.router model.router_dim model.rank"),
    ("model.fusion", lambda fusion: fusion != "ffn", "model.feature_layers model.num_feature_layers"),
    ("model.fusion", lambda fusion: fusion == "none", "model.image_size"),
    ("model.router", lambda router: router != "layer", "model.router_dim"),
    ("model.feature_layers", lambda layers: layers is not None, "model.num_feature_layers"),
    ("model.lora.rank", lambda rank: rank == 0, "model.lora.alpha model.lora.dropout model.lora.targets"),
    ("data.task", lambda task: task != "caption", "data.prompt data.captions"),
    ("data.task", lambda task: task != "scienceqa", "data.scienceqa.image_captions"),
    ("data.task", lambda task: task != "scienceqa", "data.scienceqa.lecture data.scienceqa.solution"),
    ("data.cache_dir", lambda path: path is None, "data.cache_gb"),
    ("data.on_bad", lambda on_bad: on_bad == "raise", "data.max_bad_share"),
    ("data.val", lambda path: path is None, "data.val_samples train.validate_every"),
    ("eval.every_steps", lambda steps: steps == 0, "eval.data eval.max_samples eval.batch_size"),
    ("eval.every_steps", lambda steps: steps == 0, "eval.max_new_tokens eval.num_beams eval.tokenizer"),
    ("resume", lambda resume: resume not in ("auto", "never"), "init_from"),
)


def ignored_settings(config: RunConfig) -> list[str]:
    """One line for each setting that is not its default and has no effect because of another."""
    lines: dict[str, str] = {}
    for cause, is_idle, names in WITHOUT_EFFECT:
        found = attrgetter(cause)(config)
        for name in names.split() if is_idle(found) else ():
            value = attrgetter(name)(config)
            if value != settings_of(RunConfig)[name].get_default():
                lines.setdefault(name, f"{name} {value} has no effect: {cause} is {found}")
    return list(lines.values())
