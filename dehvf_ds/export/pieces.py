"""The tensors of an exported model, one at a time, so that a model of any size is merged in little memory.

The decoder's weights come from its own files, with the adapters' deltas added in fp32. What is small, the
branch and the tower, is held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dehvf_ds.export.decoder import DecoderFiles
from dehvf_ds.model import DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.adapters import decoder_layers, folded_weight, lora_scaling
from dehvf_ds.model.artifact import LORA_FILE, decoder_name, load_adapter, peft_name
from dehvf_ds.model.backbones import load_backbone, loaded_name
from dehvf_ds.model.weights import TrainedModel, settle_head_of


class Piece(NamedTuple):
    """One tensor of the exported model; ``read`` computes it, in ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass
class Skeleton:
    """A trained model without its decoder's weights.

    Attributes:
        model: branch and tower loaded, the decoder on the meta device unless it is a mixture of experts; its
            configuration is the export's.
        files: the decoder's.
        lora: the FFN adapters by PEFT's names, fp32; empty without any.
        scaling: what an adapter's product is multiplied by.
        dtype: of the exported weights.
        fold: whether the adapters go into the weights. Else what was trained stays apart, in fp32.
    """

    model: DehvfForConditionalGeneration
    files: DecoderFiles
    lora: dict[str, Tensor]
    scaling: float
    dtype: torch.dtype
    fold: bool

    def small_tensors(self) -> dict[str, Tensor]:
        """Branch and tower, by their names in the model."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}

    def decoder_pieces(self) -> list[Piece]:
        """The decoder, with its adapters in it or beside it, in the model's order.

        Raises:
            ModelError: the decoder's files do not hold every weight, or an adapter belongs to none.
        """
        tensors = dict(_stored_tensors(self.model.language_model))
        frozen = {name: tuple(t.shape) for name, t in tensors.items() if ".lora_" not in name}
        own_names = {name: decoder_name(name) for name in frozen}
        sources = self.files.match(
            {own_names[name]: shape for name, shape in frozen.items()},
            partial(loaded_name, self.model.language_model),
            _twins(self.model.language_model),
        )
        stems = {name.rpartition(".lora_")[0] for name in self.lora}
        if lost := stems - {_stem(name) for name in own_names.values()}:
            raise ModelError(f"the adapter {min(lost)} belongs to no weight of {self.files.source}")
        pieces = []
        for name, tensor in tensors.items():
            if name in frozen:
                own = own_names[name]
                read = partial(self._frozen_weight, own, sources[own])
                shown = name.replace(".base_layer.", ".") if self.fold else name
                pieces.append(Piece(shown, frozen[name], self.dtype, read))
            elif not self.fold:
                lora = self.lora[peft_name(name)]
                pieces.append(Piece(name, tuple(tensor.shape), lora.dtype, partial(_same, lora)))
        return pieces

    def _frozen_weight(self, own_name: str, source: str) -> Tensor:
        weight = self.files.read(source)
        lora_a = self.lora.get(f"{_stem(own_name)}.lora_A.weight")
        if self.fold and lora_a is not None and own_name.endswith(".weight"):
            lora_b = self.lora[f"{_stem(own_name)}.lora_B.weight"]
            weight = folded_weight(weight, lora_a, lora_b, self.scaling)
        return weight.to(self.dtype)


def build_skeleton(trained: TrainedModel, *, dtype: torch.dtype | None, fold: bool) -> Skeleton:
    """Builds a trained model without its decoder's weights.

    Args:
        trained: an adapter artifact with its base models.
        dtype: of the exported weights; None takes that of the decoder's files.
        fold: whether the FFN adapters go into the weights.

    Raises:
        ModelError: the model is merged already, or a tensor is missing or does not fit.
    """
    if trained.language_model is None or trained.vision_tower is None:
        raise ModelError(f"{trained.path} is merged already")
    config = copy.deepcopy(trained.config)
    settle_head_of(config, trained.language_model)
    files = DecoderFiles.find(trained.language_model)
    dtype = dtype or files.dtype
    tower = None
    if config.fusion != "none":
        tower = load_backbone(trained.vision_tower, config.vision_config, dtype, vision=True)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config.text_config)
    if any(hasattr(layer.mlp, "experts") for layer in decoder_layers(decoder)):
        # transformers stacks what the files hold of each expert; so it is loaded whole.
        decoder = load_backbone(trained.language_model, config.text_config, dtype, vision=False)
    model = DehvfForConditionalGeneration(config, decoder, tower)
    load_adapter(model, trained.path)
    lora, scaling = {}, 0.0
    if config.lora is not None:
        lora, scaling = load_file(trained.path / LORA_FILE), lora_scaling(config.lora)
    if fold:
        config.lora = None
        for parameter in model.trainable_parameters().values():
            parameter.data = parameter.data.to(dtype)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    return Skeleton(model, files, lora, scaling, dtype, fold)


def check_values(piece: Piece, tensor: Tensor) -> None:
    """Refuses values that an exported weight cannot have.

    Raises:
        ModelError: there are none, or some are not finite; in fp16 because they are too large for it.
    """
    if tensor.numel() == 0:
        raise ModelError(f"{piece.name}: holds no values")
    # The sum is finite in fp32 unless a value is not: one pass, without a mask as large as the tensor.
    if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        why = "; fp16 ends at 65504: pass --dtype bf16" if piece.dtype == torch.float16 else ""
        raise ModelError(f"{piece.name}: holds values that are not finite{why}")


def _stored_tensors(decoder: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What of the decoder is on the meta device, by names in the whole model; tied weights once."""
    yield from ((n, t) for n, t in decoder.named_parameters("language_model") if t.is_meta)
    parameters = {name for name, _ in decoder.named_parameters("language_model", remove_duplicate=False)}
    for name, tensor in decoder.state_dict(prefix="language_model.").items():
        if tensor.is_meta and name not in parameters:
            yield name, tensor


def _twins(decoder: torch.nn.Module) -> dict[str, list[str]]:
    """The names of each weight of a decoder, in its own words: of a tied one there are two."""
    names: dict[int, list[str]] = {}
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(decoder_name(name))
    return {name: same for same in names.values() for name in same}


def _stem(own_name: str) -> str:
    return peft_name(f"language_model.{own_name.rpartition('.')[0]}")


def _same(tensor: Tensor) -> Tensor:
    return tensor
