"""The settings of the programs. A field's type defines its values, the text below it is its help."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

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
)

Beams = Annotated[Positive, Field(description="hypotheses of beam search; 1 is greedy")]
BackbonePath = Annotated[LocalPath | None, Field(description="its path now; None: as in training")]


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
    """The parts of a ScienceQA problem in prompt and target; the defaults are QCM-A."""

    image_captions: bool = False
    """put the shards' caption of the picture into the context (MemVP and ADEM-VL: in evaluation only)"""
    lecture: bool = False
    """add the lecture to the target; with solution this is QCM-ALE"""
    solution: bool = False
    """add the solution to the target"""


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
    """place of the shards if not train: a directory, a URL (https://, s3://), or a pipe: command"""
    cache_dir: LocalPath | None = None
    """directory on a fast local disk that shards are copied to before they are read"""
    cache_gb: PositiveNumber = 100.0
    """largest size of cache_dir in GB (1e9 bytes); the least recently used shards are deleted first"""
    task: Literal["caption", "scienceqa", "chat"] = "caption"
    """chooses prompt and target"""
    prompt: str | None = None
    """the instruction before a caption; None takes the task's own"""
    captions: Literal["all", "one"] = "all"
    """all makes a sample of every caption of a picture; one draws one caption an epoch"""
    captions_together: Positive = 1
    """up to so many captions of a picture stay in one micro-batch, which encodes it once for all of them"""
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
    """loader processes per rank"""
    val: LocalPath | None = None
    """directory of validation shards; None validates nothing"""
    val_samples: AtLeastZero = 0
    """captions, problems or chats of val to take, from the first; 0 means all"""

    def __post_init__(self) -> None:
        k = self.captions_together
        alone = f"data.captions_together {k} needs data.captions all; one draws a single caption a picture"
        require(k == 1 or self.captions == "all", alone)


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
    compile: bool = False
    """compile LLM layers and the tower's blocks (torch.compile): a slower start, faster steps on a GPU"""
    max_bad_steps: Positive = 5
    """non-finite steps in a row after which the run stops"""
    save_every: AtLeastZero = 0
    """optimizer steps between checkpoints; 0 saves only when the run is stopped"""
    keep_checkpoints: Positive = 2
    """number of newest checkpoints to keep, beside the best"""
    max_failed_saves: Positive = 3
    """checkpoints in a row that could not be written after which the run stops"""
    validate_every: AtLeastZero = 0
    """optimizer steps between validations on data.val; 0 validates at the end only"""
    router_every: AtLeastZero = 50
    """optimizer steps between records of the fuser's layer weights and scales; 0 records none"""
    timeout_minutes: PositiveNumber = 30.0
    """how long a rank waits in training for another that is silent before the job fails"""
    start_timeout_minutes: PositiveNumber = 30.0
    """the same until training begins: in ZeRO-3 all wait while one reads the weights"""
    log_every: Positive = 10
    """optimizer steps between plain log lines when the console is not a terminal"""
    trackers: Annotated[tuple[str, ...], Listed] = ("tensorboard",)
    """experiment trackers by accelerate's names: tensorboard, wandb, mlflow, swanlab, ..."""

    def __post_init__(self) -> None:
        self.accumulation(1)

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step; refuses ranks that do not divide the global batch."""
        rows = self.micro_batch_size * world_size
        require(
            self.global_batch_size % rows == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{self.micro_batch_size} x {world_size} ranks; set train.micro_batch_size to a divisor of "
            f"{self.global_batch_size / world_size:g}",
        )
        return self.global_batch_size // rows


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class InTrainingConfig:
    """In-training evaluation: answers and scores, with a full copy of the model on every rank."""

    every_steps: AtLeastZero = 0
    """optimizer steps between evaluations, with one at the end; 0 evaluates nothing"""
    data: LocalPath | None = None
    """directory of evaluation shards; None takes data.val"""
    max_samples: Positive = 256
    """rows to answer, from the first"""
    batch_size: Positive = 16
    """rows answered together on one rank"""
    max_new_tokens: Positive | None = None
    """longest answer in tokens; None takes 40 for captions, 8 for ScienceQA, 256 for chats"""
    num_beams: Beams = 1
    tokenizer: Literal["ptb", "simple"] = "ptb"
    """of caption scores; simple needs no Java; its numbers are not comparable with published ones"""


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class RunConfig:
    """One training run."""

    run_dir: LocalPath
    """directory of the run's output; created"""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: InTrainingConfig = field(default_factory=InTrainingConfig)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """seed of initial values, order and augmentation"""
    deepspeed: LocalPath = "ds_configs/zero3.json"
    """path of the DeepSpeed JSON, or the name of a shipped one"""
    overwrite: bool = False
    """empty run_dir if it holds another run; otherwise such a directory is refused"""
    resume: LocalPath = "auto"
    """auto continues from the newest checkpoint of run_dir, if it has one; never; or a checkpoint's path"""
    init_from: LocalPath | None = None
    """run directory or adapter artifact with trained weights to start from"""
    dry_run: bool = False
    """check everything, read a batch of each set, train a scaled-down copy for a step; write nothing"""

    def __post_init__(self) -> None:
        if self.eval.every_steps:
            require(self.data.task != "chat", "eval.every_steps: data.task chat has no scores; leave it 0")
            has_rows = self.eval.data is not None or self.data.val is not None
            require(has_rows, "eval.every_steps needs rows to answer: set eval.data or data.val")
        rows, k = self.train.micro_batch_size, self.data.captions_together
        require(
            rows % k == 0,
            f"train.micro_batch_size {rows} is not a multiple of data.captions_together {k}; change one",
        )


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
    """directory to write TASK-SPLIT/ into; None takes eval/ of the run"""
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
    """put the shards' caption of the picture into ScienceQA's context; recorded in the results"""
    tokenizer: Literal["ptb", "simple"] = "ptb"
    """of caption scores; simple needs no Java; its numbers are not comparable with published ones"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute dtype; auto takes the model's, or fp32 where bf16 is slow"""
    language_model: BackbonePath = None
    vision_tower: BackbonePath = None
    loss: bool = False
    """also measure the loss per token over all references"""

    def __post_init__(self) -> None:
        fits = self.min_new_tokens <= (self.max_new_tokens or self.min_new_tokens)
        require(fits, "min_new_tokens is larger than max_new_tokens")
        if self.task == "caption":
            require(self.reading == "generation", "reading likelihood is ScienceQA's; captions are generated")
            require(not self.image_captions, "image_captions is for task scienceqa, not caption")
        else:
            require(self.references is None, "references is for task caption, not scienceqa")
        fits = self.images is None or self.data.lower().endswith(".json")
        require(fits, "images needs data to be an annotation file")


@dataclass(frozen=True, kw_only=True, config=CHECKS)
class GenerateConfig:
    """Captions or answers from the shell."""

    model: LocalPath
    """run directory, checkpoint, adapter artifact or merged model directory"""
    image: list[LocalPath] = field(default_factory=list)
    """picture files, and directories of pictures, taken by name; without any only the prompt is used"""
    prompt: str | None = None
    """instruction or question; None takes the one that the model was trained with"""
    choices: list[str] = field(default_factory=list)
    """options of a ScienceQA question, in order; a model of that task needs them"""
    hint: str | None = None
    """context of a ScienceQA question"""
    output: LocalPath | None = None
    """file for a JSON object a line, - for the console; None prints only texts"""
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
        require(
            not self.stream or self.num_beams == 1,
            "stream needs num_beams 1: beams have no words to print as they come",
        )
        require(not self.stream or self.output != "-", "stream and output - both write to the console")
        has_input = bool(self.image) or self.prompt is not None
        require(has_input, "pass pictures with --image, or a question with --prompt")
        require(len(self.choices) != 1, "choices: a question has at least two")
