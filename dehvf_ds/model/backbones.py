"""The frozen backbones, an HF decoder and an HF vision tower: found, read strictly, built into the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME, logging

from .configuration import DehvfConfig, ModelError, spaced_layers, square_side
from .fingerprint import LANGUAGE_PARTS, StoredFile, bare_name, is_weight, stored_tensors
from .modeling import DehvfForConditionalGeneration, refuse_incomplete
from .trial import MISFITS, try_backbones

ADAPTER_FILE = "adapter_config.json"
"""PEFT's. Where it lies beside a model, transformers loads that adapter, onto the model that it names."""

MAX_PATCHES = 64
"""Most patches along one side of a picture: a tower's attention grows with the fourth power of it."""


def load_backbone_config(source: str, *, vision: bool) -> PreTrainedConfig:
    """Reads a backbone's configuration from a directory or hub id, and refuses what cannot be used.

    Of a two-tower checkpoint (CLIP) the vision part is taken when ``vision``.
    """
    kind, directory = "vision tower" if vision else "language model", Path(source)
    # A hub id has one slash at most.
    is_path = source.startswith((".", "~", "/")) or source.rstrip("/").count("/") > 1
    if is_path and not directory.is_dir():
        where = "" if directory.is_absolute() else f" in {Path.cwd()}"
        setting = kind.replace(" ", "_")
        raise ModelError(f"{kind} {source}: no such directory{where}; set {setting} to where it lies")
    if (directory / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{kind} {source}: holds {ADAPTER_FILE}, a PEFT adapter that would be loaded with it; take a "
            "model that it is merged into, or one without it"
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except MISFITS as error:
        hint = "" if directory.is_dir() else f" (nor is there a directory {directory.absolute()})"
        raise ModelError(f"{kind} {source}: {_first_line(error)}{hint}") from None
    _check_json(directory / GENERATION_CONFIG_NAME)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        fields = quantisation if isinstance(quantisation, Mapping) else quantisation.to_dict()
        method = str(fields.get("quant_method") or "quantization_config")
        raise ModelError(
            f"{kind} {source}: its weights are quantised ({method}); take the model that they were made of"
        )
    if vision:
        config = getattr(config, "vision_config", config)
        if square_side(getattr(config, "patch_size", None)) is None:
            raise ModelError(f"vision tower {source}: a {config.model_type} model has no patches of one size")
    return config


def _check_json(path: Path) -> None:
    """Refuses a damaged file: transformers would ignore it, and with it the tokens that end an answer."""
    try:
        whole = not path.is_file() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise ModelError(f"{path}: not a JSON object; copy it again, or remove it where the model has none")


def load_backbone(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    vision: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Loads a backbone's weights; partitioned where an ``HfDeepSpeedConfig`` of ZeRO-3 is alive.

    On a ``device`` each weight goes there as it is read, so that the host never holds all of them; for the
    meta device names and shapes alone are read.
    """
    auto_class: Any = AutoModel if vision else AutoModelForCausalLM
    given: dict[str, Any] = {"dtype": dtype}
    if device is not None and device.type != "cpu":
        given["device_map"] = {"": device}
    checks = device is not None and device.type == "meta"
    stored = stored_tensors(source)
    try:
        # What its table of missing and unexpected weights would say is decided below.
        with _quiet(progress=not checks):
            model, info = auto_class.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=checks, **given
            )
    except MISFITS as error:
        raise ModelError(f"{source}: {_first_line(error)}") from None
    own = {bare_name(name) for name, _ in model.named_parameters()}
    for alias, names in names_in_files(model, stored).items():
        for name in names if alias in own else ():
            # transformers would cast them, without their scales.
            if stored[name].is_quantised:
                kind = str(stored[name].dtype).removeprefix("torch.")
                raise ModelError(
                    f"{source}: {name} is stored as {kind}: its weights are quantised; take the model that "
                    "they were made of"
                )
    lost = [name for name in info["unexpected_keys"] if _belongs_to(model, name, vision=vision)]
    refuse_incomplete(model, info, lost, source)
    return model


def _belongs_to(model: PreTrainedModel, name: str, *, vision: bool) -> bool:
    """Whether a tensor that the model has no place for was a part of it: not of another tower, not a buffer.

    What lies in its layers was; of a decoder also what lies beside a weight of its own, as a bias would.
    """
    if not is_weight(name, (1, 1)) or (vision and LANGUAGE_PARTS.intersection(name.split("."))):
        return False
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if any(bare_name(name).startswith(f"{bare_name(layers)}.") for layers in lists):
        return True
    # A tied head's weight counts, too.
    named = model.named_parameters(remove_duplicate=False)
    parents = {bare_name(own).rpartition(".")[0] for own, _ in named}
    return not vision and bare_name(name).rpartition(".")[0] in parents


def names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, set[str]]:
    """The files' names of a model's tensors, by its own names for them, both without wrapping words.

    transformers renames some tensors as it loads them (the head of GPT-NeoX); either name is found.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    found: dict[str, set[str]] = {}
    for name in stored:
        loaded = name
        for renaming in renamings:
            loaded, _ = renaming.rename_source_key(loaded)
        for alias in (bare_name(name), bare_name(loaded)):
            found.setdefault(alias, set()).add(name)
    return found


def settle_head(config: DehvfConfig, source: str) -> None:
    """Makes ``tie_word_embeddings`` say what the decoder's files hold; changes ``config`` in place.

    Where the configuration ties the LM head to the embedding and the files hold another head, transformers
    keeps the two apart with a warning; where weights are partitioned it cannot tell and ties them.
    """
    text_config: Any = config.text_config
    if getattr(text_config, "tie_word_embeddings", False) and _has_own_head(text_config, source):
        text_config.tie_word_embeddings = False
    config.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)


def _has_own_head(config: PreTrainedConfig, source: str) -> bool:
    """Whether a decoder's files hold an LM head that is not its embedding."""
    # Its class itself: `from_config` would partition it where weights are to be partitioned.
    decoder_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"), no_init_weights():
        decoder = decoder_class(config)
    own_names = {module: name for name, module in decoder.named_modules()}
    tensors = stored_tensors(source)
    aliases = names_in_files(decoder, tensors)
    found = []
    for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
        names = aliases.get(bare_name(f"{own_names.get(module)}.weight"), set())
        if len(names) != 1:
            return False
        (name,) = names
        found.append(StoredFile(tensors[name].path).read(name))
    return not torch.equal(*found)


def build_config(
    language_model: str, vision_tower: str, *, num_feature_layers: int | None = None, **settings: Any
) -> DehvfConfig:
    """Builds the model's configuration over two backbones, given as directories or hub ids.

    ``settings`` are the other arguments of ``DehvfConfig``; if they name no feature layers, as many as
    ``num_feature_layers`` are taken, evenly spaced.
    """
    vision_config = load_backbone_config(vision_tower, vision=True)
    _check_image_size(settings.get("image_size"), vision_config, vision_tower)
    if not settings.get("feature_layers") and num_feature_layers is not None:
        settings["feature_layers"] = spaced_layers(
            getattr(vision_config, "num_hidden_layers", 0), num_feature_layers
        )
    text_config = load_backbone_config(language_model, vision=False)
    parts = ("vision_config", "audio_config", "text_config")
    alone = not getattr(text_config, "is_encoder_decoder", False)
    alone = alone and not any(hasattr(text_config, part) for part in parts)
    if not alone or type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"language model {language_model}: a {text_config.model_type} model is no decoder with an LM "
            "head and nothing beside it; of a model with several parts, name the decoder that it was made of"
        )
    return DehvfConfig(text_config=text_config, vision_config=vision_config, **settings)


def _check_image_size(image_size: int | None, vision_config: PreTrainedConfig, source: str) -> None:
    """Refuses half patches (but a tower's own: SigLIP of 384 pixels in patches of 14), and far too many."""
    patch_size = square_side(getattr(vision_config, "patch_size", None))
    if image_size is None or not patch_size:
        return
    below = image_size // patch_size * patch_size
    if below > MAX_PATCHES * patch_size:
        raise ModelError(
            f"model.image_size {image_size} makes {image_size // patch_size} patches of {patch_size} pixels "
            f"a side of {source}; set it to {MAX_PATCHES * patch_size} at most"
        )
    if image_size not in (below, square_side(getattr(vision_config, "image_size", None))):
        near = f"{below} or {below + patch_size}" if below else str(patch_size)
        raise ModelError(
            f"model.image_size {image_size} is no multiple of the {patch_size} pixels of a patch of "
            f"{source}; set it to {near}"
        )


def check_bases(config: DehvfConfig, language_model: str, vision_tower: str) -> None:
    """Refuses backbones that ``load_model`` would refuse, or would make something else of than was trained.

    Tries small copies out and reads the files' headers; those of a hub id may not be here yet.
    """
    try_backbones(config)
    bases = [(language_model, config.text_config), (vision_tower, config.vision_config)]
    for source, part in bases[: 1 if config.fusion == "none" else 2]:
        if Path(source).is_dir():
            vision = part is config.vision_config
            load_backbone(source, part, torch.float32, vision=vision, device=torch.device("meta"))


def load_model(
    config: DehvfConfig,
    language_model: str,
    vision_tower: str,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | None = None,
) -> DehvfForConditionalGeneration:
    """Loads the frozen backbones, see ``load_backbone``, and builds the branch at its start values.

    Under ZeRO-3 the branch is whole on every rank, and equal, since it is a function of ``seed`` alone.
    """
    settle_head(config, language_model)
    decoder = load_backbone(language_model, config.text_config, dtype, vision=False, device=device)
    tower = None
    if config.fusion != "none":
        tower = load_backbone(vision_tower, config.vision_config, dtype, vision=True, device=device)
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(config, decoder, tower)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def _quiet(*, progress: bool = False) -> Iterator[None]:
    """Leaves it to the error to say what is wrong, once, and not to warnings and a hub's retries."""
    hub = getLogger("huggingface_hub")
    level, verbosity, bars = hub.level, logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub.setLevel(logging.ERROR)
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
