"""Models as a whole: built over their backbones, found where a run left them, merged for export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .artifact import CONFIG_FILE, load_adapter, read_manifest
from .backbones import check_backbone, check_decoder_config, load_backbone, load_backbone_config, settle_head
from .configuration import DehvfConfig, ModelError, spaced_levels, square_side
from .identity import check_base
from .modeling import DehvfForConditionalGeneration
from .sketch import sketch_weights
from .trial import try_backbones

EXPORT_FILE = "export.json"
"""In a merged directory: what it was made of, and size and hash of its weights."""

MAX_PATCHES = 64
"""Most patches along one side of a picture: a tower's attention grows with the fourth power of it."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    vision_config = load_backbone_config(vision_tower, vision=True)
    _check_image_size(settings.get("image_size"), vision_config, vision_tower)
    if not settings.get("levels") and num_levels is not None:
        settings["levels"] = spaced_levels(getattr(vision_config, "num_hidden_layers", 0), num_levels)
    text_config = load_backbone_config(language_model, vision=False)
    check_decoder_config(text_config, language_model)
    return DehvfConfig(text_config=text_config, vision_config=vision_config, **settings)


def load_model(
    config: DehvfConfig,
    language_model: str,
    vision_tower: str,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | None = None,
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
        device: where the backbones go as they are read, not through the host's memory; not under ZeRO-3.

    Raises:
        ModelError: a checkpoint lacks weights, or does not have the expected structure.
    """
    settle_head_of(config, language_model)
    decoder = load_backbone(language_model, config.text_config, dtype, vision=False, device=device)
    tower = None
    if config.fusion != "none":
        tower = load_backbone(vision_tower, config.vision_config, dtype, vision=True, device=device)
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(config, decoder, tower)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return model


def check_bases(config: DehvfConfig, language_model: str, vision_tower: str) -> None:
    """Refuses backbones that ``load_model`` would refuse, or would load something else of than was trained.

    Reads the headers of their files, and tries scaled-down copies out.

    Args:
        config: the model's configuration.
        language_model: directory or hub id of the decoder.
        vision_tower: directory or hub id of the tower.

    Raises:
        ModelError: what is wrong with one.
    """
    try_backbones(config)
    check_backbone(language_model, config.text_config, vision=False)
    if config.fusion != "none":
        check_backbone(vision_tower, config.vision_config, vision=True)


def settle_head_of(config: DehvfConfig, language_model: str) -> None:
    """Makes the configuration say whether the decoder's files hold a head of its own, see ``settle_head``.

    Raises:
        ModelError: the files cannot be read.
    """
    settle_head(config.text_config, language_model)
    config.tie_word_embeddings = getattr(config.text_config, "tie_word_embeddings", False)


def _check_image_size(image_size: int | None, vision_config: PreTrainedConfig, source: str) -> None:
    """Refuses a size that cuts patches; a tower's own may (SigLIP of 384 pixels in patches of 14).

    A size of far too many patches is refused, too: it would be tried out until the user gives up.
    """
    patch_size = square_side(getattr(vision_config, "patch_size", None))
    own_size = square_side(getattr(vision_config, "image_size", None))
    if image_size is not None and patch_size and image_size // patch_size > MAX_PATCHES:
        raise ModelError(
            f"model.image_size {image_size} makes {image_size // patch_size} patches of {patch_size} pixels "
            f"a side of {source}; set it to {MAX_PATCHES * patch_size} at most"
        )
    if image_size is None or patch_size is None or image_size == own_size or image_size % patch_size == 0:
        return
    below = image_size // patch_size * patch_size
    near = f"{below} or {below + patch_size}" if below else str(patch_size)
    raise ModelError(
        f"model.image_size {image_size} is no multiple of the {patch_size} pixels of a patch of {source}; "
        f"set it to {near}"
    )


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; fp32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk, found and checked but not loaded.

    Attributes:
        path: the adapter artifact or merged directory.
        config: the model's configuration.
        dtype: compute dtype that it was trained or written in.
        language_model: directory or hub id of the decoder; None for a merged directory.
        vision_tower: directory or hub id of the tower; None for a merged directory.
    """

    path: Path
    config: DehvfConfig
    dtype: torch.dtype
    language_model: str | None = None
    vision_tower: str | None = None

    @property
    def task(self) -> str | None:
        """What it was trained for: ``caption``, ``scienceqa`` or ``chat``; None where nothing says so."""
        if self.config.task is None and self.language_model is not None:
            return read_manifest(self.path).get("task")  # artifacts from before the configuration knew
        return self.config.task

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer lies."""
        return self.language_model or str(self.path)

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype that the base language model was stored in."""
        return _stored_dtype(self.config.text_config)

    @property
    def processor_source(self) -> str:
        """Where the image processor lies."""
        return self.vision_tower or str(self.path)

    def fingerprint(self) -> str:
        """A hash that tells this model from others: of its files' hashes, or of a merged one's sketch."""
        if self.language_model is None:
            parts = [sketch_weights(str(self.path), vision=vision) for vision in (False, True)]
            content = json.dumps([self.config.to_json_string(), *parts], sort_keys=True)
        else:
            manifest = read_manifest(self.path)
            content = json.dumps([manifest["files"], manifest["bases"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(
        self, dtype: str = "auto", *, fast_bf16: bool = True, device: torch.device | str = "cpu"
    ) -> DehvfForConditionalGeneration:
        """Loads the model, whole, in evaluation mode.

        Args:
            dtype: ``fp32``, ``bf16``, or ``auto`` for its own.
            fast_bf16: whether the device computes bf16 well; without that ``auto`` means fp32.
            device: where it goes as it is read, not through the host's memory.

        Raises:
            ModelError: a base model or a tensor does not fit.
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
    """The adapter artifact of a run directory or checkpoint, or the artifact itself.

    Raises:
        ModelError: there is none.
    """
    path = Path(path)
    for directory in (path, path / "adapter"):
        if (directory / CONFIG_FILE).is_file():
            return directory
    if not path.exists():
        raise ModelError(f"{path}: no such directory")
    if checkpoints := sorted((path / "checkpoints").glob("step_*")):
        raise ModelError(f"{path}: the run has not ended; name one of its checkpoints, as {checkpoints[-1]}")
    raise ModelError(f"{path}: neither a run with an adapter, nor an adapter, nor a merged model")


def find_trained(
    path: Path | str, language_model: str | None = None, vision_tower: str | None = None
) -> TrainedModel:
    """Finds a trained model: a run directory, its adapter artifact, or a merged directory.

    Args:
        path: one of the three.
        language_model: where the decoder lies now; None takes the artifact's path.
        vision_tower: where the tower lies now; None takes the artifact's path.

    Raises:
        ModelError: there is none, its files are damaged, or a base differs from the trained one.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        config = load_backbone_config(str(path), vision=False)
        if not isinstance(config, DehvfConfig):
            raise ModelError(f"{path}: holds a {config.model_type} model, not a DEHVF one")
        return TrainedModel(path, config, _stored_dtype(config))
    path = find_adapter(path)
    manifest = read_manifest(path)
    given = {"language_model": language_model, "vision_tower": vision_tower}
    sources = {name: source or manifest["bases"][name]["path"] for name, source in given.items()}
    for name, source in sources.items():
        check_base(manifest["bases"][name], source, vision=name == "vision_tower", owner=str(path))
    config = DehvfConfig.from_json_file(str(path / CONFIG_FILE))
    return TrainedModel(path, config, getattr(torch, manifest["dtype"]), **sources)


def _check_sizes(directory: Path) -> None:
    """Refuses an export of which a file is missing or cut short; the hashes would take as long as loading."""
    record = directory / EXPORT_FILE
    if not record.is_file():
        return
    try:
        files = dict(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{record}: damaged ({type(error).__name__}: {error}); copy it again") from None
    for name, promised in files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise ModelError(f"{path}: missing, which {EXPORT_FILE} names; copy it again")
        if found != promised["bytes"]:
            raise ModelError(f"{path}: {found} bytes, not {promised['bytes']}; copy it again")
