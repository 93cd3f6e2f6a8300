"""Samples and batches, which travel from the data to the model, and the names of axes.

Axes in all annotations: ``batch`` rows, ``tokens`` text positions, ``vocab``,
``pictures`` of a batch, which several rows may share, ``dim`` LLM width, ``layers`` LLM layers,
``feature_layers`` of the tower, ``slots`` visual tokens of one feature layer (class token and patches),
``vision_dim``, ``rank`` width of the visual memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100
"""Label of positions that the loss ignores."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row read from a shard, decoded but neither transformed nor tokenised.

    Attributes:
        key: the sample's unique ``__key__`` within its data set.
        image: in mode RGB, or None for a text-only row.
        record: the row's ``.json`` member; its fields depend on the task.
        messages: the parsed turns of a conversation read from a shard, as ``prompts.Messages``.
        epoch: epoch in which it was drawn.
        example: its number among the epoch's examples, or that of the first of those that stay together;
            augmentation is seeded by both.
    """

    key: str
    image: Image.Image | None
    record: dict[str, Any]
    messages: Sequence[Mapping[str, str]] = ()
    epoch: int = 0
    example: int = 0


class BatchFacts(NamedTuple):
    """What the host must know of a micro-batch, counted where it is made: later it would wait for the device.

    Facts of several micro-batches add up.

    Attributes:
        num_rows: rows.
        num_pictures: pictures that the tower sees, zeros for rows without one among them.
        num_supervised: labels that count in the loss.
        num_text_tokens: text tokens that the model reads, without padding.
        num_positions: the same with padding: rows times width.
        num_pairs: pairs of positions in one row, padding included: rows times width squared.
        num_unsupervised_rows: rows without a label that counts.
        num_pictured_rows: rows with a picture.
        checksum: see ``Batch.checksum``.
    """

    num_rows: int
    num_pictures: int
    num_supervised: int
    num_text_tokens: int
    num_positions: int
    num_pairs: int
    num_unsupervised_rows: int
    num_pictured_rows: int
    checksum: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of one micro-batch, as the model takes them.

    Attributes:
        input_ids: token ids, padded on the right for training and on the left for generation.
        attention_mask: 1 at text, 0 at padding.
        labels: ``input_ids`` at supervised positions, ``IGNORE_INDEX`` elsewhere, not shifted.
        pixel_values: normalised pictures, each once; one of zeros if no row has a picture.
        has_image: whether the row has a picture.
        picture: the row's picture by its number, 0 for a row without; None: each row has one of its own.
        supervised: positions that predict a label, in the rows laid end to end; None if not yet looked for.
        facts: counts of the above; None if not yet counted, see ``with_facts``.
        keys: the samples' keys, in row order.
        substituted: for each damaged sample that was replaced by another, its shard and what is wrong.
    """

    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, "batch tokens"]
    pixel_values: Float[Tensor, "pictures 3 height width"]
    has_image: Bool[Tensor, " batch"]
    picture: Int[Tensor, " batch"] | None = None
    supervised: Int[Tensor, " chosen"] | None = None
    facts: BatchFacts | None = None
    keys: tuple[str, ...] = ()
    substituted: tuple[tuple[str, str], ...] = ()

    def count(self) -> BatchFacts:
        """Its ``facts``, counted now if they are missing. On the CPU, before it moves."""
        return self.facts or BatchFacts(
            num_rows=len(self.input_ids),
            num_pictures=len(self.pixel_values),
            num_supervised=self.num_supervised(),
            num_text_tokens=self.num_input_tokens(),
            num_positions=self.input_ids.numel(),
            num_pairs=self.input_ids.numel() * self.input_ids.shape[1],
            num_unsupervised_rows=self.num_unsupervised_rows(),
            num_pictured_rows=int(self.has_image.sum()),
            checksum=self.checksum(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Small tensors travel inside the message, ``pixel_values`` through shared memory.

        There each tensor is a connection from the receiver to the sender, which may have to wait for it.
        """
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu" and name != "pixel_values":
                state[name] = value.numpy()
        return _unpack, (state,)

    def with_facts(self) -> Batch:
        """The batch with ``supervised`` and ``facts``; itself if it has them. On the CPU, before it moves."""
        if self.facts is not None and self.supervised is not None:
            return self
        return replace(self, supervised=self._supervised_positions(), facts=self.count())

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies while the host goes on; see DataLoader."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.inputs().items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Moves the tensors; ``dtype`` applies to ``pixel_values`` only.

        ``supervised`` is looked for before, on the CPU: on a GPU the host would have to wait for its size.
        """
        if self.supervised is None and self.labels.device.type == "cpu":
            return replace(self, supervised=self._supervised_positions()).to(device, dtype)
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if dtype is not None:
            moved["pixel_values"] = moved["pixel_values"].to(dtype)
        return replace(self, **moved)

    def without_last(self) -> Batch:
        """The batch without the last position of its rows; for rows padded on the left."""
        names = ("input_ids", "attention_mask", "labels")
        cut = {name: getattr(self, name)[:, :-1] for name in names}
        return replace(self, **cut, supervised=None, facts=None)

    def inputs(self) -> dict[str, Tensor]:
        """The tensors by name, as keyword arguments of the model."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def training_inputs(self) -> dict[str, Tensor | bool]:
        """``inputs``, and what the host knows of them, so that a forward need not ask the device.

        Without ``has_image`` where every row has a picture.
        """
        inputs: dict[str, Tensor | bool] = {**self.inputs()}
        if self.facts is not None:
            inputs["padded"] = self.facts.num_text_tokens < self.facts.num_positions
            if self.facts.num_pictured_rows == self.facts.num_rows:
                del inputs["has_image"]
        return inputs

    def num_supervised(self) -> int:
        """Labels that count in the loss; a row's first token cannot."""
        return int(self._label_counts().sum())

    def num_unsupervised_rows(self) -> int:
        """Rows without a label that counts, such as one filled by its prompt."""
        return len(self.unsupervised_rows())

    def unsupervised_rows(self) -> list[int]:
        """The numbers of the rows without a label that counts."""
        return (~self._label_counts().any(dim=1)).nonzero()[:, 0].tolist()

    def _label_counts(self) -> Bool[Tensor, "batch predicting"]:
        """Whether each position predicts a label that counts: the model shifts."""
        return self.labels[:, 1:] != IGNORE_INDEX

    def _supervised_positions(self) -> Int[Tensor, " chosen"]:
        return F.pad(self._label_counts(), (0, 1)).flatten().nonzero()[:, 0]

    def checksum(self) -> int:
        """Sum over the rows of the CRC-32 of key and token ids.

        Independent of the rows' order and padding, so that sums over micro-batches and ranks tell whether
        two optimizer steps saw the same rows.
        """
        keys = self.keys or ("",) * len(self.input_ids)
        rows = zip(keys, self.input_ids.cpu(), self.attention_mask.bool().cpu(), strict=True)
        return sum(
            zlib.crc32(ids[mask].numpy().tobytes(), zlib.crc32(key.encode(errors="surrogateescape")))
            for key, ids, mask in rows
        )

    def num_input_tokens(self) -> int:
        """Text tokens that the model reads, without padding."""
        return int(self.attention_mask.sum())


def _unpack(state: dict[str, Any]) -> Batch:
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            state[name] = torch.from_numpy(value)
    return Batch(**state)
