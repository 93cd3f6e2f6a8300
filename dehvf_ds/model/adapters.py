"""Moved; this name goes with its last import."""

from .lora import decoder_layers, fold_lora, folded_weight, lora_scaling  # noqa: F401
