"""Where samples come from and what they become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dehvf_ds.config.kinds import (
    AtLeastZero,
    LocalPath,
    Positive,
    PositiveNumber,
    Range,
    Share,
    ShareBelowOne,
    check_ranges,
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

    min_crop: Annotated[float, Range(0.01, 1)] = 1.0
    flip: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "data.augment.")


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

    train: LocalPath
    location: LocalPath | None = None
    cache_dir: LocalPath | None = None
    cache_gb: PositiveNumber = 100.0
    task: Literal["caption", "scienceqa", "chat"] = "caption"
    prompt: str | None = None
    captions: Literal["all", "one"] = "all"
    scienceqa: ScienceqaConfig = field(default_factory=ScienceqaConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_tokens: Annotated[int, Range(8, 2**20)] = 128
    shuffle_window: Positive = 4096
    bucket_steps: Annotated[int, Range(0, 10**6)] = 0
    tail: Literal["wrap", "drop"] = "wrap"
    on_bad: Literal["raise", "replace"] = "raise"
    max_bad_share: ShareBelowOne = 0.01
    num_workers: Annotated[int, Range(0, 256)] = 2
    val: LocalPath | None = None
    val_samples: AtLeastZero = 0

    def __post_init__(self) -> None:
        check_ranges(self, "data.")
