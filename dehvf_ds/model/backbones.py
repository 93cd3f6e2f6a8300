"""The frozen backbones, an HF decoder and an HF vision tower: found, loaded, built into the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME, find_adapter_config_file, logging

from .configuration import DehvfConfig, ModelError, spaced_layers, square_side
from .fingerprint import (
    LANGUAGE_PARTS,
    StoredFile,
    StoredTensor,
    bare_name,
    is_weight,
    stored_tensors,
    weights_fingerprint,
)
from .modeling import DehvfForConditionalGeneration, refuse_incomplete
from .trial import try_backbones

MAX_PATCHES = 64
"""Largest number of patches along one side: a tower's attention grows with its fourth power."""

_USE_ORIGINAL = "take the model that they were made of"


class Partitions(Protocol):
    """Where ZeRO-3 puts a backbone's weights: every rank holds its share of each (``training.zero``)."""

    def require_same(self, source: str, contents: object) -> None:
        """Refuses a checkpoint whose ``contents``, of any plain type, are not the same on all ranks."""
        ...

    def read(self, tensors: Mapping[nn.Parameter, StoredTensor]) -> None:
        """Partitions parameters without values, and reads this rank's share of each from its file."""
        ...

    def filled_by_transformers(self, source: str, num_bytes: int) -> AbstractContextManager[None]:
        """Within it ``from_pretrained`` partitions: rank 0 reads all and sends the others their shares."""
        ...


def load_backbone_config(source: str, *, vision: bool) -> PreTrainedConfig:
    """Reads a backbone's configuration from a directory or hub id; refuses one that cannot be used.

    ``vision`` takes the vision part of a two-tower checkpoint (CLIP).
    """
    kind, directory = "vision tower" if vision else "language model", Path(source)
    # A hub id has one slash at most.
    is_path = source.startswith((".", "~", "/")) or source.rstrip("/").count("/") > 1
    if is_path and not directory.is_dir():
        where = "" if directory.is_absolute() else f" in {Path.cwd()}"
        setting = kind.replace(" ", "_")
        raise ModelError(f"{kind} {source}: no such directory{where}; set {setting} to its path")
    config = None
    try:
        with _quiet():
            # It makes transformers load that adapter, onto the model that it names.
            adapter = find_adapter_config_file(source)
            if adapter is None:
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        hint = "" if directory.is_dir() else f" (nor is there a directory {directory.absolute()})"
        raise ModelError(f"{kind} {source}: {_first_line(error)}{hint}") from None
    if config is None:
        raise ModelError(
            f"{kind} {source}: holds adapter_config.json, a PEFT adapter that would be loaded with it; use a "
            "model that it is merged into, or one without it"
        )
    _check_json(directory / GENERATION_CONFIG_NAME)
    if quantisation := getattr(config, "quantization_config", None):
        fields = quantisation if isinstance(quantisation, Mapping) else quantisation.to_dict()
        method = fields.get("quant_method") or "quantization_config"
        raise ModelError(f"{kind} {source}: its weights are quantised ({method}); {_USE_ORIGINAL}")
    if vision:
        config = getattr(config, "vision_config", config)
        if square_side(getattr(config, "patch_size", None)) is None:
            raise ModelError(f"vision tower {source}: a {config.model_type} model has no patches of one size")
    return config


def _check_json(path: Path) -> None:
    """Refuses a damaged file, which transformers would ignore, and with it the tokens that end an answer."""
    try:
        whole = not path.is_file() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise ModelError(f"{path}: not a JSON object; copy it again, or remove it if the model has none")


def load_backbone(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    vision: bool,
    device: torch.device | None = None,
    partitions: Partitions | None = None,
) -> PreTrainedModel:
    """Loads a backbone's weights.

    With ``device`` each weight is moved as it is read, so that the host never holds all of them; for the
    meta device only names and shapes are read. With ``partitions`` every rank reads its own share of each.
    """
    auto_class: Any = AutoModel if vision else AutoModelForCausalLM
    placed: dict[str, Any] = {"dtype": dtype}
    if device is not None and device.type != "cpu":
        placed["device_map"] = {"": device}
    only_shapes = device is not None and device.type == "meta"
    stored = stored_tensors(source)
    if partitions is not None:
        kinds = sorted((name, str(tensor.dtype), tensor.path.suffix) for name, tensor in stored.items())
        partitions.require_same(source, [kinds, sorted(weights_fingerprint(source, vision=vision).items())])
    loaded = None
    try:
        # Its table of missing and unexpected weights is replaced by the refusals below.
        with _quiet(progress=not only_shapes):
            if partitions is not None:
                loaded = _load_shares(source, config, dtype, stored, partitions, vision=vision)
            if loaded is None:
                whole = nullcontext()
                if partitions is not None:
                    num_bytes = sum(t.num_elements * t.dtype.itemsize for t in stored.values())
                    whole = partitions.filled_by_transformers(source, num_bytes)
                with whole:
                    loaded = auto_class.from_pretrained(
                        source,
                        config=config,
                        output_loading_info=True,
                        ignore_mismatched_sizes=only_shapes,
                        **placed,
                    )
            model, info = loaded
    except (AssertionError, MemoryError, ModelError):
        # A fault of DeepSpeed's partitioning, or of the machine: no mistake in the files.
        raise
    except Exception as error:
        raise ModelError(f"{source}: {_first_line(error)}") from None
    own = {bare_name(name) for name, _ in model.named_parameters()}
    for alias, names in names_in_files(model, stored).items():
        for name in names if alias in own else ():
            # transformers would cast them, without their scales.
            if stored[name].is_quantised:
                dtype_name = str(stored[name].dtype).removeprefix("torch.")
                raise ModelError(
                    f"{source}: {name} is stored as {dtype_name}: its weights are quantised; {_USE_ORIGINAL}"
                )
    lost = [name for name in info["unexpected_keys"] if _belongs_to(model, name, vision=vision)]
    refuse_incomplete(model, info, lost, source)
    return model


def _load_shares(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    stored: Mapping[str, StoredTensor],
    partitions: Partitions,
    *,
    vision: bool,
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """Loads a backbone whose weights stay in the files but for this rank's shares, with the loading info.

    None if not every weight is one tensor of a safetensors file, as transformers maps them. That is left to
    transformers: it loads, in each tensor's place, one value that is expanded to the tensor's shape, and the
    parameter where such a stand-in ends up is that tensor's.
    """
    model_class = _model_class(config, vision=vision)
    if not isinstance(model_class, type) or any(t.path.suffix != ".safetensors" for t in stored.values()):
        return None
    # Of other files than stored_tensors looks for.
    if getattr(config, "transformers_weights", None) is not None:
        return None
    if _are_converted(_on_meta(model_class, config), stored):
        return None
    stand_ins = {
        name: torch.zeros((), dtype=dtype if tensor.dtype.is_floating_point else tensor.dtype).expand(
            tensor.shape
        )
        for name, tensor in stored.items()
    }
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=stand_ins,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    origins = {stand_in.data_ptr(): stored[name] for name, stand_in in stand_ins.items()}
    found: dict[nn.Parameter, StoredTensor] = {}
    for weight in model.state_dict(keep_vars=True).values():
        tensor = origins.get(weight.data_ptr())
        if tensor is None or not isinstance(weight, nn.Parameter) or weight.shape != tensor.shape:
            return None
        found[weight] = tensor
    partitions.read(found)
    # What else from_pretrained takes from a directory.
    model.name_or_path = model.config.name_or_path = source
    if model.can_generate():
        model.generation_config = _generation_config(source)
    return model, info


def _model_class(config: PreTrainedConfig, *, vision: bool) -> Any:
    """The class that an Auto class would take; not a class if it would choose among several."""
    return (MODEL_MAPPING if vision else MODEL_FOR_CAUSAL_LM_MAPPING).get(type(config), None)


def _on_meta(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _are_converted(model: PreTrainedModel, stored: Iterable[str]) -> bool:
    """Whether transformers makes other tensors of the stored ones, such as one of all experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return any(rename_source_key(name, renamings, converters)[1] is not None for name in stored)


def _generation_config(source: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True
        )


def _belongs_to(model: PreTrainedModel, name: str, *, vision: bool) -> bool:
    """Whether a stored tensor that the model has no place for belongs to it: not to another tower, no buffer.

    Those in its layers do; for a decoder also those beside one of its own weights, such as a bias.
    """
    if not is_weight(name, (1, 1)) or (vision and LANGUAGE_PARTS.intersection(name.split("."))):
        return False
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if any(bare_name(name).startswith(f"{bare_name(layers)}.") for layers in lists):
        return True
    # With duplicates, for the weight of a tied head.
    named = model.named_parameters(remove_duplicate=False)
    parents = {bare_name(own).rpartition(".")[0] for own, _ in named}
    return not vision and bare_name(name).rpartition(".")[0] in parents


def names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, set[str]]:
    """Maps the model's tensor names, without wrapping prefixes, to the names that the files store them under.

    transformers renames some tensors as it loads them (the head of GPT-NeoX); both names are keys.
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
    """Sets ``tie_word_embeddings`` in ``config`` to what the decoder's files hold.

    If the configuration ties the LM head to the embedding but the files hold another head, transformers
    warns and keeps both; with partitioned weights it cannot see that and ties them.
    """
    text_config: Any = config.text_config
    if getattr(text_config, "tie_word_embeddings", False) and _has_own_head(text_config, source):
        text_config.tie_word_embeddings = False
    config.tie_word_embeddings = getattr(text_config, "tie_word_embeddings", False)


def _has_own_head(config: PreTrainedConfig, source: str) -> bool:
    """Whether a decoder's files hold an LM head that is not its embedding."""
    decoder = _on_meta(_model_class(config, vision=False), config)
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
    """Builds the model's configuration over two backbones, directories or hub ids.

    ``settings`` are the other arguments of ``DehvfConfig``; without ``feature_layers`` in them,
    ``num_feature_layers`` evenly spaced ones are taken.
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
            f"language model {language_model}: a {text_config.model_type} model is not a plain decoder "
            "with an LM head; of a model with several parts, take the decoder that it was made of"
        )
    return DehvfConfig(text_config=text_config, vision_config=vision_config, **settings)


def _check_image_size(image_size: int | None, vision_config: PreTrainedConfig, source: str) -> None:
    """Refuses far too many patches, and half ones unless the tower's own size has them (SigLIP, 384/14)."""
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
    """Refuses backbones that ``load_model`` would refuse, or that would compute something else in the model.

    Tries small copies and reads the files' headers, except for a hub id, whose files may not be here yet.
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
    partitions: Partitions | None = None,
) -> DehvfForConditionalGeneration:
    """Loads the frozen backbones, see ``load_backbone``, and builds the branch at its start values.

    Under ZeRO-3 the branch is not partitioned, and equal on all ranks, as it depends on ``seed`` alone.
    """
    settle_head(config, language_model)
    placed: dict[str, Any] = {"device": device, "partitions": partitions}
    decoder = load_backbone(language_model, config.text_config, dtype, vision=False, **placed)
    tower = None
    if config.fusion != "none":
        tower = load_backbone(vision_tower, config.vision_config, dtype, vision=True, **placed)
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(config, decoder, tower)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def _quiet(*, progress: bool = False) -> Iterator[None]:
    """Silences warnings, a hub's retries and, without ``progress``, progress bars: the error says it all."""
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
