"""The frozen backbones: an HF decoder and an HF vision tower, read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
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

from .configuration import ModelError, square_side
from .loading import refuse_mismatched, refuse_missing, refuse_not_finite
from .sketch import LANGUAGE_PARTS, bare_name, is_weight
from .stored import StoredFile, StoredTensor, stored_tensors

ADAPTER_FILE = "adapter_config.json"
"""PEFT's. Where it lies beside a model, transformers loads that adapter, onto the model that it names."""

# What reading a configuration raises: a class of transformers checks its own fields, too.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)


def load_backbone_config(source: str, *, vision: bool) -> PreTrainedConfig:
    """Reads a backbone's configuration from a directory or hub id.

    Of a two-tower checkpoint (CLIP) the vision part is taken when ``vision``.

    Raises:
        ModelError: nothing readable is there, the model is quantised, or a vision part is asked of a model
            without one.
    """
    kind = "vision tower" if vision else "language model"
    if _is_path(source) and not Path(source).is_dir():
        where = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
        flag = kind.replace(" ", "_")
        raise ModelError(f"{kind} {source}: no such directory{where}; set {flag} to where it lies")
    if (Path(source) / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{kind} {source}: holds {ADAPTER_FILE}, a PEFT adapter that would be loaded with it; take a "
            "model that it is merged into, or one without it"
        )
    try:
        with _quiet_hub():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _UNREADABLE as error:
        gguf = sorted(path.name for path in Path(source).glob("*.gguf")) if Path(source).is_dir() else []
        hint = f" ({gguf[0]} is of llama.cpp: take the model that it was made of)" if gguf else ""
        if not Path(source).is_dir():
            hint = f" (nor is there a directory {Path(source).absolute()})"
        raise ModelError(f"{kind} {source}: {_first_line(error)}{hint}") from None
    _check_generation_config(Path(source) / GENERATION_CONFIG_NAME)
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


def _check_generation_config(path: Path) -> None:
    """Refuses a damaged file, which transformers would pass over with the tokens that end an answer."""
    if not path.is_file():
        return
    try:
        damaged = not isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        damaged = True
    if damaged:
        raise ModelError(f"{path}: not a JSON object; copy it again, or remove it where the model has none")


def check_decoder_config(config: PreTrainedConfig, source: str) -> None:
    """Refuses what is no decoder of text.

    Raises:
        ModelError: it is a vision-language model, an encoder-decoder, or has no LM head.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"language model {source}: a {kind} model has an encoder; a decoder alone is needed")
    if any(hasattr(config, part) for part in ("vision_config", "audio_config", "text_config")):
        raise ModelError(
            f"language model {source}: a {kind} model has other parts than a language model; name the "
            "decoder that it was made of"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"language model {source}: a {kind} model has no LM head")


def load_backbone(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    vision: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Loads a backbone's weights; partitioned where an ``HfDeepSpeedConfig`` of ZeRO-3 is alive.

    Args:
        source: directory or hub id.
        config: what ``load_backbone_config`` gave.
        dtype: dtype of the weights.
        vision: whether it is the tower.
        device: where each weight goes as it is read, so that the host never holds all of them; None leaves
            them on the CPU, or to ZeRO-3.

    Raises:
        ModelError: the checkpoint cannot be read, lacks weights, or holds some that the model has no place
            for.
    """
    placed = {} if device is None or device.type == "cpu" else {"device_map": {"": device}}
    return _load(source, config, vision=vision, dtype=dtype, **placed)


def check_backbone(source: str, config: PreTrainedConfig, *, vision: bool) -> None:
    """Refuses what ``load_backbone`` would, and files cut short, by the files' headers alone.

    Of a hub id nothing is looked at: its files may not be here yet.

    Raises:
        ModelError: a file is missing or damaged, or its tensors are not the model's.
    """
    if Path(source).is_dir():
        with _without_progress_bar():
            # Tensors of the meta device have names and shapes, and are not read.
            _load(source, config, vision=vision, device_map="meta", ignore_mismatched_sizes=True)


def settle_head(config: PreTrainedConfig, source: str) -> None:
    """Makes ``tie_word_embeddings`` say what a decoder's files hold.

    Where the configuration ties the LM head to the embedding and the files hold another head, transformers
    keeps the two apart with a warning; where weights are partitioned it cannot tell and ties them.

    Args:
        config: of the decoder; changed in place.
        source: directory or hub id.

    Raises:
        ModelError: the files cannot be read.
    """
    if not getattr(config, "tie_word_embeddings", False):
        return
    # Its class itself: `from_config` would partition it where weights are to be partitioned.
    decoder_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"), no_init_weights():
        decoder = decoder_class(config)
    names = {id(module): name for name, module in decoder.named_modules()}
    both = [names.get(id(each)) for each in (decoder.get_input_embeddings(), decoder.get_output_embeddings())]
    tensors = stored_tensors(source)
    found = []
    renamed = {stored: loaded_name(decoder, stored) for stored in tensors}
    for name in both:
        same = [
            stored
            for stored in tensors
            if bare_name(f"{name}.weight") in map(bare_name, (stored, renamed[stored]))
        ]
        found.append(same[0] if name is not None and len(same) == 1 else None)
    embedding, head = found
    if embedding is None or head is None:
        return
    weights = []
    for name in (embedding, head):
        with StoredFile(tensors[name][0]) as file:
            weights.append(file.read(name))
    if not torch.equal(*weights):
        config.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue]


def loaded_name(model: PreTrainedModel, name: str) -> str:
    """What transformers calls a file's tensor when it loads it: of GPT-NeoX it renames the head.

    Args:
        model: of the class that the file is of.
        name: the file's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    for transform in get_model_conversion_mapping(model):
        if isinstance(transform, WeightRenaming):
            name, _ = transform.rename_source_key(name)
    return name


def _load(source: str, config: PreTrainedConfig, *, vision: bool, **settings: Any) -> PreTrainedModel:
    auto_class: Any = AutoModel if vision else AutoModelForCausalLM
    verbosity = logging.get_verbosity()
    # What its table of missing and unexpected weights would say is decided below.
    logging.set_verbosity_error()
    stored = stored_tensors(source)
    try:
        model, info = auto_class.from_pretrained(source, config=config, output_loading_info=True, **settings)
    except (*_UNREADABLE, RuntimeError) as error:
        raise ModelError(f"{source}: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    refuse_missing(info["missing_keys"], source)
    refuse_mismatched(info, source)
    _refuse_quantised(model, stored, source)
    refuse_not_finite(((name, _own_part(p)) for name, p in model.named_parameters()), source)
    lost = [name for name in info["unexpected_keys"] if _belongs_to(model, name, vision=vision)]
    if lost:
        raise ModelError(
            f"{source}: holds {len(lost)} weights that its config.json has no place for, {min(lost)} among "
            "them; what it computed when it was trained is not what it would compute here"
        )
    return model


def _refuse_quantised(
    model: PreTrainedModel, stored: Mapping[str, tuple[Path, StoredTensor]], source: str
) -> None:
    """Refuses weights stored as whole numbers or in 8 bits: transformers casts them, without scales."""
    own = {bare_name(name) for name, _ in model.named_parameters()}
    for name, (_, tensor) in stored.items():
        is_weight_dtype = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if not is_weight_dtype and own & {bare_name(name), bare_name(loaded_name(model, name))}:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{source}: {name} is stored as {kind}: its weights are quantised; take the model that they "
                "were made of"
            )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """What of a parameter is at hand; under ZeRO-3 this rank's share, without what fills up the last."""
    share: Any = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter
    group = getattr(parameter, "ds_process_group", None)
    start = share.numel() * torch.distributed.get_rank(group)
    return share.flatten()[: max(0, parameter.ds_numel - start)]  # pyright: ignore[reportAttributeAccessIssue]


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


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Lets a hub that cannot be reached be told once, by the error, and not at every retry."""
    logger = getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_path(source: str) -> bool:
    """Whether it cannot be a hub id, which has one slash at most."""
    return source.startswith((".", "~", "/")) or source.rstrip("/").count("/") > 1


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
