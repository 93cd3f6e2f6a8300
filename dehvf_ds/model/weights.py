"""Weights in and out: frozen backbones, the adapter artifact, and the merged model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .adapters import ADAPTER_NAME, fold_lora, peft_config
from .configuration import DehvfConfig, ModelError
from .modeling import DehvfForConditionalGeneration

ARTIFACT_FILES = ("visual.safetensors", "dehvf_config.json", "manifest.json")
_LORA_FILE = "adapter_model.safetensors"
# Fields of a backbone's configuration that say nothing about its weights.
_LOOSE_FIELDS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


def load_backbone_config(source: str, *, vision: bool) -> PreTrainedConfig:
    """Reads a backbone's configuration from a directory or hub id.

    Of a two-tower checkpoint (CLIP) the vision part is taken when ``vision``.

    Raises:
        ModelError: nothing readable is there, or a vision part is asked of a model without one.
    """
    kind = "vision tower" if vision else "language model"
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{kind} {source}: {_first_line(error)}") from None
    if vision:
        config = getattr(config, "vision_config", config)
        if not hasattr(config, "patch_size"):
            raise ModelError(f"vision tower {source}: a {config.model_type} model has no patches")
    return config


def build_config(
    language_model: str, vision_tower: str, *, num_levels: int | None = None, **settings: Any
) -> DehvfConfig:
    """Builds the model's configuration over two backbones.

    Args:
        language_model: directory or hub id of the decoder.
        vision_tower: directory or hub id of the tower.
        num_levels: chooses evenly spaced levels where ``settings`` names none.
        **settings: the other arguments of ``DehvfConfig``.

    Raises:
        ModelError: a backbone cannot be read or a setting does not fit it.
    """
    from .configuration import spaced_levels

    vision_config = load_backbone_config(vision_tower, vision=True)
    if not settings.get("levels") and num_levels is not None:
        settings["levels"] = spaced_levels(vision_config.num_hidden_layers, num_levels)
    return DehvfConfig(
        text_config=load_backbone_config(language_model, vision=False), vision_config=vision_config, **settings
    )


def load_model(
    config: DehvfConfig, language_model: str, vision_tower: str, *, dtype: torch.dtype, seed: int = 0
) -> DehvfForConditionalGeneration:
    """Loads the frozen backbones and builds the branch at its start values.

    Under an active ``HfDeepSpeedConfig`` with ZeRO-3 the backbones come partitioned; the branch, some
    5 M parameters, is whole on every rank and equal, since it is a function of ``seed``.

    Args:
        config: the model's configuration.
        language_model: directory or hub id of the decoder.
        vision_tower: directory or hub id of the tower.
        dtype: compute dtype of all weights.
        seed: seed of the branch's start values.

    Raises:
        ModelError: a checkpoint lacks weights, or does not have the expected structure.
    """
    decoder = _load_backbone(AutoModelForCausalLM, language_model, config.text_config, dtype)
    tower = None
    if config.fusion != "none":
        tower = _load_backbone(AutoModel, vision_tower, config.vision_config, dtype)
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(config, decoder, tower)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return model


def load_from_adapter(
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    language_model: str | None = None,
    vision_tower: str | None = None,
) -> DehvfForConditionalGeneration:
    """Loads the base models and applies an adapter artifact to them.

    Args:
        directory: the artifact, ``RUN_DIR/adapter``.
        dtype: compute dtype; None takes the run's.
        language_model: where the decoder lies now; None takes the manifest's path.
        vision_tower: where the tower lies now; None takes the manifest's path.

    Raises:
        ModelError: a file of the artifact is missing, or a base differs from the trained one.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    config = DehvfConfig.from_json_file(str(directory / "dehvf_config.json"))
    bases = {
        "language_model": language_model or manifest["bases"]["language_model"]["path"],
        "vision_tower": vision_tower or manifest["bases"]["vision_tower"]["path"],
    }
    for name, source in bases.items():
        found = base_identity(source, vision=name == "vision_tower")["config"]
        wanted = manifest["bases"][name]["config"]
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing:
            raise ModelError(
                f"{source} is not the {name.replace('_', ' ')} that {directory} was trained on: "
                f"{', '.join(differing)} differ"
            )
    dtype = dtype or getattr(torch, manifest["dtype"])
    model = load_model(config, **bases, dtype=dtype)
    load_adapter(model, directory)
    return model.eval()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads an artifact's manifest and checks that its files are whole.

    Raises:
        ModelError: a file is missing or its hash differs.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise ModelError(f"{directory}: no manifest.json; not an adapter artifact")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: missing")
        if _sha256(directory / name) != digest:
            raise ModelError(f"{directory / name}: changed since it was written (sha256 differs)")
    return manifest


def base_identity(source: str, *, vision: bool) -> dict[str, Any]:
    """What tells one base model from another: its path and the weight-shaping configuration fields."""
    config = load_backbone_config(source, vision=vision).to_dict()
    return {"path": source, "config": {k: v for k, v in config.items() if k not in _LOOSE_FIELDS}}


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    model: DehvfForConditionalGeneration,
    *,
    language_model: str,
    vision_tower: str,
    dtype: torch.dtype,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes the adapter artifact: everything that was trained, and the names of what was not.

    It is written beside its final name and then renamed, so that a crash leaves the previous one.

    Args:
        directory: final name; an artifact there is replaced.
        tensors: every trainable tensor by its name in the model, whole, fp32.
        model: the model, for its configuration.
        language_model: path or hub id of the decoder.
        vision_tower: path or hub id of the tower.
        dtype: compute dtype of the run.
        info: more for the manifest, JSON values (step, samples, task).

    Raises:
        ModelError: ``tensors`` is not exactly the trainable set, or holds values that are not finite.
    """
    wanted = set(model.trainable_parameters())
    if set(tensors) != wanted:
        raise ModelError(f"adapter tensors differ from the trainable set: {sorted(set(tensors) ^ wanted)[:4]}")
    broken = [name for name, tensor in tensors.items() if tensor.numel() == 0 or not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"not written, empty or not finite: {', '.join(broken[:4])}")
    part = directory.with_name(directory.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    visual = {n: t.contiguous() for n, t in tensors.items() if ".lora_" not in n}
    save_file(visual, part / "visual.safetensors")
    model.config.to_json_file(str(part / "dehvf_config.json"), use_diff=False)
    if model.config.lora is not None:
        lora = {_to_peft_name(n): t.contiguous() for n, t in tensors.items() if ".lora_" in n}
        (part / "lora").mkdir()
        save_file(lora, part / "lora" / _LORA_FILE, metadata={"format": "pt"})
        saved = model.language_model.peft_config[ADAPTER_NAME]
        saved.base_model_name_or_path = language_model
        saved.inference_mode = True
        saved.save_pretrained(str(part / "lora"))
    files = sorted(p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file())
    manifest = {
        "format": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "bases": {
            "language_model": base_identity(language_model, vision=False),
            "vision_tower": base_identity(vision_tower, vision=True),
        },
        "files": {name: _sha256(part / name) for name in files},
        **(info or {}),
    }
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def load_adapter(model: DehvfForConditionalGeneration, directory: Path | str) -> None:
    """Copies an artifact's tensors into a model; every trainable must be there with its shape.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    directory = Path(directory)
    tensors = load_file(directory / "visual.safetensors")
    lora_file = directory / "lora" / _LORA_FILE
    parameters = model.trainable_parameters()
    if lora_file.is_file():
        by_peft_name = {_to_peft_name(name): name for name in parameters if ".lora_" in name}
        for name, tensor in load_file(lora_file).items():
            tensors[by_peft_name.get(name, name)] = tensor
    if set(tensors) != set(parameters):
        raise ModelError(
            f"{directory}: tensors do not fit the model: {sorted(set(tensors) ^ set(parameters))[:4]}"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ModelError(
                f"{directory}: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])


def save_merged(model: DehvfForConditionalGeneration, directory: Path) -> None:
    """Folds the LoRA adapters into the frozen weights and writes a Hugging Face model directory.

    The visual branch depends on the picture and stays a module. ``model`` is changed.

    Args:
        model: a whole model on one device.
        directory: created; must not exist.
    """
    fold_lora(model)
    model.config.lora = None
    # PEFT's mark on the decoder would make transformers save an adapter in the place of the model.
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(model.language_model, attribute):
            delattr(model.language_model, attribute)
    model.save_pretrained(directory)


def _load_backbone(
    auto_class: type, source: str, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    try:
        model, info = auto_class.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: {_first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{source}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them")
    return model


def _to_peft_name(name: str) -> str:
    """``language_model.model.layers.0.mlp[.ffn].down_proj.lora_A.default.weight`` as PEFT names it."""
    parts = [p for p in name.split(".") if p != ADAPTER_NAME]
    if "ffn" in parts:
        parts.remove("ffn")
    return "base_model.model." + ".".join(parts[1:])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
