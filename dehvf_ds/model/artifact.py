"""The adapter artifact: everything that was trained, and the identity of what was not.

visual.safetensors   projector, fuser, reader and FFN gains, fp32
lora/                the FFN adapters in PEFT's own layout, with the base LLM's names
dehvf_config.json    the model's configuration
manifest.json        base models, hashes of the files, where training stood
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import ADAPTER_NAME
from .configuration import ModelError, check_version
from .identity import base_identity
from .modeling import DehvfForConditionalGeneration

CONFIG_FILE = "dehvf_config.json"
MANIFEST_FILE = "manifest.json"
VISUAL_FILE = "visual.safetensors"
LORA_FILE = "lora/adapter_model.safetensors"


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
        raise ModelError(
            f"adapter tensors differ from the trainable set: {sorted(set(tensors) ^ wanted)[:4]}"
        )
    broken = [name for name, tensor in tensors.items() if tensor.numel() == 0 or not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"not written, empty or not finite: {', '.join(broken[:4])}")

    def write(part: Path) -> None:
        part.mkdir(parents=True)
        _write_parts(part, tensors, model, language_model, vision_tower, dtype, info)

    replace_artifact(directory, write)


def replace_artifact(directory: Path, write: Callable[[Path], object]) -> None:
    """Writes an artifact beside its final name and renames it, so that a crash leaves the previous one.

    Args:
        directory: final name; what is there is replaced.
        write: writes it into the directory that it is given, which is not there yet.
    """
    part = directory.with_name(directory.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_parts(
    part: Path,
    tensors: Mapping[str, Tensor],
    model: DehvfForConditionalGeneration,
    language_model: str,
    vision_tower: str,
    dtype: torch.dtype,
    info: Mapping[str, Any] | None,
) -> None:
    visual = {n: t.contiguous() for n, t in tensors.items() if ".lora_" not in n}
    save_file(visual, part / VISUAL_FILE)
    model.config.to_json_file(str(part / CONFIG_FILE), use_diff=False)
    if model.config.lora is not None:
        lora = {peft_name(n): t.contiguous() for n, t in tensors.items() if ".lora_" in n}
        (part / "lora").mkdir()
        save_file(lora, part / LORA_FILE, metadata={"format": "pt"})
        saved = model.language_model.peft_config[ADAPTER_NAME]
        saved.base_model_name_or_path = language_model
        saved.inference_mode = True
        saved.save_pretrained(str(part / "lora"))
    files = sorted(p.relative_to(part).as_posix() for p in part.rglob("*") if p.is_file())
    manifest = {
        "version": model.config.version,
        "dtype": str(dtype).removeprefix("torch."),
        "bases": {
            "language_model": base_identity(language_model, vision=False),
            "vision_tower": base_identity(vision_tower, vision=True, weights=model.config.fusion != "none"),
        },
        "files": {name: _sha256(part / name) for name in files},
        **(info or {}),
    }
    (part / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads an artifact's manifest and checks that its files are whole.

    Raises:
        ModelError: a file is missing or its hash differs, or another version trained it.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ModelError(f"{directory}: no manifest.json; not an adapter artifact")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files, _ = manifest.get("version", 1), dict(manifest["files"]), dict(manifest["bases"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: damaged ({type(error).__name__}: {error}); copy it again") from None
    check_version(version, str(directory))
    for name, digest in files.items():
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: missing")
        if _sha256(directory / name) != digest:
            raise ModelError(f"{directory / name}: changed since it was written (sha256 differs)")
    return manifest


def load_adapter(model: DehvfForConditionalGeneration, directory: Path | str) -> None:
    """Copies an artifact's tensors into a model; every trainable must be there with its shape.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    directory = Path(directory)
    tensors = load_file(directory / VISUAL_FILE)
    lora_file = directory / LORA_FILE
    parameters = model.trainable_parameters()
    if lora_file.is_file():
        by_peft_name = {peft_name(name): name for name in parameters if ".lora_" in name}
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


def decoder_name(name: str) -> str:
    """The decoder's own name of one of its tensors.

    ``language_model.model.layers.0.mlp[.ffn].up_proj[.base_layer].weight`` is
    ``model.layers.0.mlp.up_proj.weight`` in the plain decoder.
    """
    own = name.removeprefix("language_model.")
    return own.replace(".mlp.ffn.", ".mlp.").replace(".base_layer.", ".")


def peft_name(name: str) -> str:
    """PEFT's name of ``language_model.model.layers.0.mlp[.ffn].up_proj.lora_A.default.weight``."""
    return "base_model.model." + decoder_name(name.replace(f".{ADAPTER_NAME}.", "."))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
