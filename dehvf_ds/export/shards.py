"""Writes a model's tensors into safetensors shards, one tensor in memory at a time.

``safetensors.torch.save_file`` wants all tensors of a file at once, 5 GB here; the format is plain enough to
write as it comes: the header's length, the header in JSON, the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from dehvf_ds.export.pieces import Piece, check_values
from dehvf_ds.model.stored import SAFETENSORS_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_shards(directory: Path, pieces: Sequence[Piece], max_shard_size: str) -> dict[str, dict[str, Any]]:
    """Writes shards and, of several, their index, as ``save_pretrained`` lays them out.

    Args:
        directory: exists.
        pieces: all tensors.
        max_shard_size: as ``5GB``; a larger tensor has a shard of its own.

    Returns:
        ``bytes`` and ``sha256`` of each shard, by file name.

    Raises:
        ModelError: a tensor is damaged.
        OSError: the disk is full.
        ValueError: ``max_shard_size`` is no size.
    """
    sketch = {piece.name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in pieces}
    planned = split_torch_state_dict_into_shards(
        sketch, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    by_name = {piece.name: piece for piece in pieces}
    written = {
        file: _write_shard(directory / file, [by_name[name] for name in names])
        for file, names in planned.filename_to_tensors.items()
    }
    if planned.is_sharded:
        index = {"metadata": planned.metadata, "weight_map": planned.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _write_shard(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype, _ in pieces:
        start, end = end, end + torch.empty(shape, dtype=dtype, device="meta").nbytes
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for piece in pieces:
            tensor = piece.read()
            check_values(piece, tensor)
            if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
                raise AssertionError(f"{piece.name}: {tuple(tensor.shape)} {tensor.dtype}, not as planned")
            data = _bytes_of(tensor)
            file.write(data)
            digest.update(data)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> Any:
    """The tensor's bytes as they lie in memory, little-endian, as a buffer."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
