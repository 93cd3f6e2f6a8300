"""A sketch of a checkpoint's weights: of every tensor its shape and a few values (ours).

It is computed from the checkpoint's files, at places that depend on a tensor's size alone. So it stays the
same under another sharding, and in ``.bin`` or safetensors. Fine-tuning changes nearly all values of the
matrices, so four of each tell the models apart; ``identity.py`` compares.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .stored import StoredFile, checkpoint_files

NUM_VALUES = 4
# Module names that hold the wanted part of a checkpoint with several parts.
VISION_PARTS = {"vision_model", "vision_tower", "visual"}
LANGUAGE_PARTS = {"language_model", "text_model"}
# First words of a name that only say what the whole is wrapped in; versions of transformers differ in them.
_WRAPPERS = VISION_PARTS | LANGUAGE_PARTS | {"model", "transformer", "base_model", "gpt_neox"}
# Buffers that older checkpoints store, and layers that transformers does not load.
_NOT_WEIGHTS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|num_batches_tracked)$|^mtp\.")


def sketch_weights(source: str, *, vision: bool) -> dict[str, str]:
    """Samples a few values of every tensor of a checkpoint, without loading the model.

    Of safetensors files only those values are read (0.15 s for 26 GB). Zipped ``.bin`` files are mapped,
    where the system may read much of them ahead; older ``.bin`` files are loaded one at a time. The result is
    kept for the process until a file changes.

    Args:
        source: directory or hub id; the files of a hub id come from the local cache, or are downloaded as
            ``from_pretrained`` would.
        vision: whether the tower is wanted: of a two-tower checkpoint the vision part alone, of a multimodal
            one the language part otherwise.

    Returns:
        By tensor name, as the files have it, ``"32x48 0.125 -0.5 ..."``: the shape, then up to four values in
        fp32, at 9 digits without loss. A scalar has the shape ``"1"``.

    Raises:
        ModelError: no weights are at hand, or a file is damaged.
    """
    files = []
    for path in checkpoint_files(source):
        stat = path.stat()
        files.append((path, stat.st_mtime_ns, stat.st_size))
    return _select_part(_sketch_files(tuple(files)), vision=vision)


def sample_positions(num_elements: int) -> list[int]:
    """Places that are sampled in a flat tensor: a function of its size, so that a new name moves none.

    Multiples of the golden ratio, modulo 1, spread evenly (Knuth's multiplicative hashing).

    Args:
        num_elements: of the tensor.

    Returns:
        At most ``NUM_VALUES`` rising positions in ``0..num_elements - 1``.
    """
    fractions = [(i + 1) * 2654435769 % 2**32 for i in range(NUM_VALUES)]
    return sorted({num_elements * fraction >> 32 for fraction in fractions} if num_elements else set())


def bare_name(name: str) -> str:
    """A tensor's name without the words that only say what the whole is wrapped in."""
    return ".".join(itertools.dropwhile(_WRAPPERS.__contains__, name.split(".")))


def natural_key(name: str) -> list[str | int]:
    """Key of a tensor's name that sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _select_part(sketch: Mapping[str, str], *, vision: bool) -> dict[str, str]:
    """The tower or the decoder of a checkpoint; all of it where it has no such parts."""
    parts = VISION_PARTS if vision else LANGUAGE_PARTS
    inside = {name for name in sketch if parts.intersection(name.split(".")[:3])}
    if inside and not vision:
        inside |= {name for name in sketch if name.split(".")[-2:-1] == ["lm_head"]}
    return {name: text for name, text in sketch.items() if not inside or name in inside}


@lru_cache(maxsize=8)
def _sketch_files(files: tuple[tuple[Path, int, int], ...]) -> dict[str, str]:
    """Sketches all tensors of some files, given as path, time of change in ns and size in bytes."""
    sketch = {}
    for path, _, _ in files:
        with StoredFile(path) as file:
            for name, stored in file.tensors.items():
                if is_weight(name, stored.shape):
                    values = file.values(name, sample_positions(stored.num_elements))
                    sketch[name] = _sketch_text(stored.shape, values)
    return {name: sketch[name] for name in sorted(sketch, key=natural_key)}


def is_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether a checkpoint's tensor is a weight of the model, not a buffer that older checkpoints store."""
    causal_mask = name.endswith((".attn.bias", ".attention.bias")) and tuple(shape[:2]) == (1, 1)
    return not causal_mask and _NOT_WEIGHTS.search(name) is None


def _sketch_text(shape: Sequence[int], values: Sequence[Tensor]) -> str:
    numbers = [f"{value.to(torch.float32).item():.9g}" for value in values]
    return " ".join(["x".join(map(str, shape)) or "1", *numbers])
