"""Checkpoints of a tiny decoder, in the layouts that hubs hold."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import text_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dehvf_ds.model.fingerprint import weights_fingerprint


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = text_config()
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def save_bin(state: dict[str, Tensor], directory: Path, *, zipped: bool = True, shards: int = 1) -> None:
    directory.mkdir()
    names = list(state)
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == file}
        torch.save(part, directory / file, _use_new_zipfile_serialization=zipped)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fingerprint_of(state: dict[str, Tensor], *, vision: bool = False) -> dict[str, str]:
    """The sketch of a checkpoint with these tensors."""
    with tempfile.TemporaryDirectory() as directory:
        save_file({n: t.contiguous() for n, t in state.items()}, Path(directory) / "model.safetensors")
        return weights_fingerprint(directory, vision=vision)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
