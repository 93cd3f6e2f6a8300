"""A trained model on disk: the adapter artifact written, found and loaded onto its base models.

visual.safetensors   projector, fuser, reader and the FFNs' scales, fp32
lora/                the FFN adapters in PEFT's own layout, with the base LLM's names
dehvf_config.json    the model's configuration
manifest.json        base models with their fingerprints, hashes of the files, progress of the training
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .backbones import load_backbone_config, load_model
from .configuration import DehvfConfig, ModelError, check_version
from .ffn import ADAPTER_NAME
from .fingerprint import differences, weights_fingerprint
from .modeling import DehvfForConditionalGeneration

CONFIG_FILE = "dehvf_config.json"
MANIFEST_FILE = "manifest.json"
VISUAL_FILE = "visual.safetensors"
LORA_FILE = "lora/adapter_model.safetensors"

EXPORT_FILE = "export.json"
"""In a merged directory: its sources, and size and hash of its weights."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Fields of a backbone's configuration that do not concern its weights.
_LOOSE_FIELDS = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
)


def base_fingerprint(source: str, *, vision: bool, weights: bool = True) -> dict[str, Any]:
    """Identifies a base model (directory or hub id), as JSON values.

    ``path``; ``config``, the fields that concern its weights; ``fingerprint`` of its weights, if used.
    """
    found: dict[str, Any] = {"path": source, "config": _config_fields(source, vision=vision)}
    return found | ({"fingerprint": weights_fingerprint(source, vision=vision)} if weights else {})


def check_base(identity: Mapping[str, Any], source: str, *, vision: bool, owner: str) -> None:
    """Refuses a base model with another ``base_fingerprint``; ``owner`` names what was trained on it."""
    found = _config_fields(source, vision=vision)
    differing = sorted(key for key, value in identity["config"].items() if found.get(key) != value)
    if differing:
        raise ModelError(
            f"{source} is not the {'vision tower' if vision else 'language model'} that {owner} was trained "
            f"on: {', '.join(differing)} differ"
        )
    if "fingerprint" not in identity:
        return
    names = differences(identity["fingerprint"], weights_fingerprint(source, vision=vision))
    if names:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ModelError(
            f"{owner} was trained on {identity['path']}; what is now in {source} differs from it in the "
            f"weights of {names[0]}{others}"
        )


def _config_fields(source: str, *, vision: bool) -> dict[str, Any]:
    config = json.loads(load_backbone_config(source, vision=vision).to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in _LOOSE_FIELDS}


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
    """Writes the artifact into a new or empty directory; replacing another atomically is up to the caller.

    ``tensors`` are all trainables by their names in the model, not partitioned, fp32; the model's own are not
    read. ``dtype`` is the run's compute dtype, ``info`` more for the manifest (step, samples, task).
    """
    if differing := set(tensors) ^ set(model.trainable_parameters()):
        raise ModelError(f"adapter tensors differ from the trainable set: {sorted(differing)[:4]}")
    broken = [name for name, tensor in tensors.items() if tensor.numel() == 0 or not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"not written, empty or not finite: {', '.join(broken[:4])}")
    directory.mkdir(parents=True, exist_ok=True)
    visual = {name: tensor.contiguous() for name, tensor in tensors.items() if ".lora_" not in name}
    save_file(visual, directory / VISUAL_FILE)
    model.config.to_json_file(str(directory / CONFIG_FILE), use_diff=False)
    if model.config.lora is not None:
        lora = {peft_name(n): tensor.contiguous() for n, tensor in tensors.items() if n not in visual}
        saved = model.language_model.peft_config[ADAPTER_NAME]
        saved.base_model_name_or_path = language_model
        saved.inference_mode = True
        saved.save_pretrained(str(directory / "lora"))
        save_file(lora, directory / LORA_FILE, metadata={"format": "pt"})
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    tower_used = model.config.fusion != "none"
    manifest = {
        "version": model.config.version,
        "dtype": str(dtype).removeprefix("torch."),
        "bases": {
            "language_model": base_fingerprint(language_model, vision=False),
            "vision_tower": base_fingerprint(vision_tower, vision=True, weights=tower_used),
        },
        "files": {name: _sha256(directory / name) for name in files},
        **(info or {}),
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads an artifact's manifest; refuses missing or changed files and another ``FUNCTION_VERSION``."""
    if not (directory / MANIFEST_FILE).is_file():
        raise ModelError(f"{directory}: no manifest.json; not an adapter artifact")
    manifest = _read_record(directory / MANIFEST_FILE, "files", "bases")
    check_version(manifest.get("version", 1), str(directory))
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: missing")
        if _sha256(directory / name) != digest:
            raise ModelError(f"{directory / name}: changed since it was written (sha256 differs)")
    return manifest


def _read_record(path: Path, *objects: str) -> dict[str, Any]:
    """Reads a JSON object in which the entries ``objects`` are objects, too."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {name: dict(record[name]) for name in objects}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({type(error).__name__}: {error}); copy it again") from None


def load_adapter(model: DehvfForConditionalGeneration, directory: Path | str) -> None:
    """Copies an artifact's tensors into a model; names and shapes must match the trainables exactly."""
    directory = Path(directory)
    tensors = load_file(directory / VISUAL_FILE)
    parameters = model.trainable_parameters()
    if (directory / LORA_FILE).is_file():
        by_peft_name = {peft_name(name): name for name in parameters if ".lora_" in name}
        for name, tensor in load_file(directory / LORA_FILE).items():
            tensors[by_peft_name.get(name, name)] = tensor
    found, wanted = ({(name, t.shape) for name, t in each.items()} for each in (tensors, parameters))
    if found != wanted:
        raise ModelError(f"{directory}: tensors do not fit the model: {sorted(found ^ wanted)[:4]}")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def decoder_name(name: str) -> str:
    """The plain decoder's name of a tensor.

    ``language_model.model.layers.0.mlp[.ffn].up_proj[.base_layer].weight`` becomes
    ``model.layers.0.mlp.up_proj.weight``.
    """
    own = name.removeprefix("language_model.")
    return own.replace(".mlp.ffn.", ".mlp.").replace(".base_layer.", ".")


def peft_name(name: str) -> str:
    """PEFT's name for ``language_model.model.layers.0.mlp[.ffn].up_proj.lora_A.default.weight``."""
    return "base_model.model." + decoder_name(name.replace(f".{ADAPTER_NAME}.", "."))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class TrainedModel:
    """An adapter artifact or merged directory, found and checked but not loaded."""

    path: Path
    config: DehvfConfig
    dtype: torch.dtype
    """compute dtype of its training, or dtype of the merged weights"""
    language_model: str | None = None
    """directory or hub id of the decoder; None for a merged directory"""
    vision_tower: str | None = None
    """directory or hub id of the tower; None for a merged directory"""

    @property
    def task(self) -> str | None:
        """What it was trained for: ``caption``, ``scienceqa`` or ``chat``; None if unknown."""
        return self.config.task

    @property
    def tokenizer_source(self) -> str:
        """Path or hub id of the tokenizer."""
        return self.language_model or str(self.path)

    @property
    def processor_source(self) -> str:
        """Path or hub id of the image processor."""
        return self.vision_tower or str(self.path)

    def fingerprint(self) -> str:
        """A hash of the files' hashes, or for a merged model of its configuration and weight fingerprints."""
        if self.language_model is None:
            parts = [weights_fingerprint(str(self.path), vision=vision) for vision in (False, True)]
            content = json.dumps([self.config.to_json_string(), *parts], sort_keys=True)
        else:
            manifest = read_manifest(self.path)
            content = json.dumps([manifest["files"], manifest["bases"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(
        self, dtype: str = "auto", *, fast_bf16: bool = True, device: torch.device | str = "cpu"
    ) -> DehvfForConditionalGeneration:
        """Loads the whole model in evaluation mode, each weight straight to its device.

        ``dtype`` is ``fp32``, ``bf16``, or ``auto``: its own, or fp32 without ``fast_bf16``.
        """
        device = torch.device(device)
        compute = _DTYPES[dtype] if dtype != "auto" else self.dtype if fast_bf16 else torch.float32
        if self.language_model is None or self.vision_tower is None:
            _check_sizes(self.path)
            placed = {} if device.type == "cpu" else {"device_map": {"": device}}
            return DehvfForConditionalGeneration.from_pretrained(self.path, dtype=compute, **placed).eval()
        model = load_model(self.config, self.language_model, self.vision_tower, dtype=compute, device=device)
        load_adapter(model, self.path)
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def find_adapter(path: Path | str) -> Path:
    """The adapter artifact of a run directory or checkpoint, or the artifact itself."""
    path = Path(path)
    for directory in (path, path / "adapter"):
        if (directory / CONFIG_FILE).is_file():
            return directory
    if not path.exists():
        raise ModelError(f"{path}: no such directory")
    if checkpoints := sorted((path / "checkpoints").glob("step_*")):
        raise ModelError(f"{path}: the run has not ended; pass one of its checkpoints, as {checkpoints[-1]}")
    raise ModelError(f"{path}: neither a run with an adapter, nor an adapter, nor a merged model")


def find_trained(
    path: Path | str, language_model: str | None = None, vision_tower: str | None = None
) -> TrainedModel:
    """Finds the model of a run, checkpoint, adapter artifact or merged directory.

    Refuses damaged files and base models that it was not trained on. Base models that are not passed are
    looked for at their paths of the training.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        config = load_backbone_config(str(path), vision=False)
        if not isinstance(config, DehvfConfig):
            raise ModelError(f"{path}: holds a {config.model_type} model, not a DEHVF one")
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        return TrainedModel(path, config, dtype)
    path = find_adapter(path)
    manifest = read_manifest(path)
    passed = {"language_model": language_model, "vision_tower": vision_tower}
    sources = {name: source or manifest["bases"][name]["path"] for name, source in passed.items()}
    for name, source in sources.items():
        check_base(manifest["bases"][name], source, vision=name == "vision_tower", owner=str(path))
    config = DehvfConfig.from_json_file(str(path / CONFIG_FILE))
    return TrainedModel(path, config, getattr(torch, manifest["dtype"]), **sources)


def _check_sizes(directory: Path) -> None:
    """Refuses an export with missing or truncated files; checking hashes would take as long as loading."""
    record = directory / EXPORT_FILE
    files = _read_record(record, "files")["files"] if record.is_file() else {}
    for name, promised in files.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if found != promised["bytes"]:
            raise ModelError(f"{directory / name}: {found} bytes, not {promised['bytes']}; copy it again")
