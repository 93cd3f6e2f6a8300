"""The run's model without weights: from configuration files, or from built-in sizes of known names."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig

from dehvf_ds.config import ModelConfig
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.engine import build_model_config

# Published shapes by the last part of a path or hub id, so that a plan needs no download, and the side of
# the pictures that a tower's processor makes.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "clip-vit-large-patch14": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
    "dinov2-small": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
}
ALIASES = {"clip-vit-l14": "clip-vit-large-patch14", "dinov2-s14": "dinov2-small"}
IMAGE_SIZE = 224


def build_on_meta(settings: ModelConfig, notes: list[str]) -> DehvfForConditionalGeneration:
    """The run's model without weights.

    Args:
        settings: the run's model settings.
        notes: what was taken from built-in sizes is appended.

    Raises:
        UserError: a backbone is neither to be read nor known, or a size does not fit.
    """
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for part in ("language_model", "vision_tower"):
            source = getattr(settings, part)
            known = _known_shape(source)
            if known is not None:
                paths[part] = str(Path(directory) / part)
                known.save_pretrained(paths[part])
                notes.append(f"model.{part} {source} is no directory here: built-in sizes")
        if "vision_tower" in paths:
            image_size = settings.image_size or IMAGE_SIZE
        else:
            image_size = build_image_transform(settings.vision_tower, settings.image_size).image_size
        built = build_model_config(replace(settings, **paths), image_size=image_size)
        with torch.device("meta"):
            return DehvfForConditionalGeneration(built)


def _known_shape(source: str) -> PreTrainedConfig | None:
    """Built-in sizes for a name that is no directory here."""
    name = Path(source).name.lower()
    return None if Path(source).is_dir() else SHAPES.get(ALIASES.get(name, name))
