"""DEHVF as a Hugging Face model: a frozen decoder, a frozen vision tower, and the branch between them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import ModelOutput

from .attention import known_masks
from .configuration import Bool, DehvfConfig, Float, Int, ModelError
from .features import HierarchicalFuser, PrefixProjector, Projector, visual_features
from .ffn import MemoryReader, VisualFFN, add_lora, decoder_layers, lora_parameters

IGNORE_INDEX = -100


@dataclass
class DehvfOutput(ModelOutput):
    """Losses if labels were passed, else logits and what the decoder returns beside them."""

    loss: Tensor | None = None
    """mean cross-entropy over the supervised tokens; 0 without any"""
    loss_sum: Tensor | None = None
    """the same as a sum, fp32; the trainer weights it over ranks and micro-steps"""
    num_supervised: Tensor | None = None
    """labels that count in the loss, an int64 scalar"""
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_weights: Tensor | None = None
    """each row's fuser weights, ``[batch, layers, feature_layers]``, if pictures were encoded"""


class DehvfForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """DEHVF over an HF decoder whose layers have an ``mlp`` and an HF vision tower with hidden states.

    ``config.fusion`` selects the method: ``ffn`` embeds the pictures in every FFN and adds no token;
    ``prefix`` puts projected patches before the text; ``none`` ignores pictures. All of them have LoRA
    adapters in the FFNs unless ``config.lora`` is None. At initial values ``ffn`` and ``none`` compute
    exactly what the language model computes. Without backbones their weights are random.
    """

    config_class = DehvfConfig
    config: DehvfConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: DehvfConfig,
        language_model: PreTrainedModel | None = None,
        vision_tower: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        text_dim = config.text_config.hidden_size
        vision_dim = config.vision_config.hidden_size
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        layers = decoder_layers(self.language_model)
        if config.fusion != "none":
            self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config)
        if config.lora is not None:
            add_lora(self.language_model, config.lora)
        self._memory: tuple[Tensor | None, int] = (None, 0)
        if config.fusion == "ffn":
            self.projector = Projector(vision_dim, config.rank)
            self.fuser = HierarchicalFuser(
                config.num_layers, len(config.feature_layers), vision_dim, config.router_dim, config.router
            )
            self.reader = MemoryReader(text_dim, config.num_slots, config.rank)
            for layer in layers:
                layer.mlp = VisualFFN(layer.mlp, self.reader, config.num_slots, config.rank)
        elif config.fusion == "prefix":
            scale = getattr(config.text_config, "initializer_range", 0.02)
            self.prefix_projector = PrefixProjector(vision_dim, text_dim, config.prefix_tokens, scale)
        with no_init_weights():  # the backbones have their weights already
            self.post_init()
        # Some backbone classes tolerate missing weights; an export holds all of them.
        self._keys_to_ignore_on_load_missing = set()
        self._keys_to_ignore_on_load_unexpected = set()
        self.requires_grad_(False)
        for parameter in self.trainable_parameters().values():
            parameter.requires_grad_(True)

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: constructors set the start values."""

    def recompute_layers(self) -> None:
        """Switches activation checkpointing on for the decoder's layers."""
        decoder = self.language_model
        # Renamed in transformers 5.23, which warns about the old name.
        enable = getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        # transformers' remedy for reentrant checkpointing: a gradient that nothing before the layers takes.
        decoder.disable_input_require_grads()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: projector, fuser, reader, scales and FFN adapters."""
        chosen = {id(p) for p in lora_parameters(self.language_model)}
        for name, module in self.named_modules():
            if name in ("projector", "fuser", "reader", "prefix_projector") or isinstance(module, VisualFFN):
                chosen |= {id(p) for p in module.parameters(recurse=not isinstance(module, VisualFFN))}
        return {name: p for name, p in self.named_parameters() if id(p) in chosen}

    def train(self, mode: bool = True) -> DehvfForConditionalGeneration:
        """Sets training mode, but leaves the frozen tower in evaluation mode."""
        super().train(mode)
        if self.config.fusion != "none":
            self.vision_tower.eval()
        return self

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads an export like ``PreTrainedModel.from_pretrained``, strictly (``refuse_incomplete``)."""
        wants_info = kwargs.pop("output_loading_info", False)
        # For an error that names the tensor; transformers' own does not.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(source, *args, **kwargs)  # pyright: ignore[reportGeneralTypeIssues]
        refuse_incomplete(model, info, info["unexpected_keys"], str(source))
        return (model, info) if wants_info else model

    def get_output_embeddings(self) -> Any:
        """The decoder's LM head."""
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The decoder's stack of layers."""
        return self.language_model.get_decoder()

    def encode_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], has_image: Bool[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch layers slots rank"], Float[Tensor, "batch layers feature_layers"]]:
        """The visual memory of every LLM layer, zero on rows without a picture, and the fuser's weights."""
        features = visual_features(self.vision_tower, pixel_values, self.config.feature_layers)
        return self.fuser(features[:, :, 0], self.projector(features), _present(pixel_values, has_image))

    def prepare_memory(
        self, memory: Float[Tensor, "batch layers *slots rank"]
    ) -> Float[Tensor, "batch layers *slots rank"]:
        """Every layer's keys and values, ``[batch, layers, 2, slots, rank]``, which decoding reads per token.

        Unchanged if the weights are not all present (offloaded, partitioned).
        """
        ffns = [layer.mlp for layer in decoder_layers(self.language_model)]
        needed = (self.reader.key_positions, self.reader.value_positions, *(ffn.scale_in for ffn in ffns))
        if memory.ndim == 5 or any(p.is_meta or not p.numel() for p in needed):
            return memory
        scales = (
            [getattr(ffn, name).to(memory.device) for ffn in ffns] for name in ("scale_in", "scale_out")
        )
        return self.reader.prepare(memory, *map(torch.stack, scales))

    def set_memory(self, memory: Float[Tensor, "batch layers *slots rank"] | None) -> None:
        """Sets each layer's memory, prepared or not, until the next call."""
        # The steps of a generation all pass the same; with gradients, views must be made anew.
        version, (known, known_version) = _version(memory), self._memory
        if (
            memory is not None
            and memory is known
            and version == known_version
            and not torch.is_grad_enabled()
        ):
            return
        self._memory = (memory, version)
        layers = decoder_layers(self.language_model)
        # unbind: the backward of indexing would fill a tensor of the whole size for each layer.
        slices = [None] * len(layers) if memory is None else memory.unbind(dim=1)
        for layer, one in zip(layers, slices, strict=True):
            layer.mlp.memory = self.reader.split(one) if one is not None and one.ndim == 4 else one

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "pictures 3 height width"] | None = None,
        has_image: Bool[Tensor, " batch"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        visual_memory: Float[Tensor, "batch layers *slots rank"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        supervised: Int[Tensor, " chosen"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        picture: Int[Tensor, " batch"] | None = None,
        padded: bool | None = None,
        **kwargs: Any,
    ) -> DehvfOutput:
        """Returns losses only if ``labels`` are passed, else logits at the last ``logits_to_keep`` positions.

        0 keeps all, a tensor those positions. ``generate`` keeps one: a prompt's others would be as large as
        prompt times vocabulary.
        ``supervised`` holds the positions whose logits make the loss, each one before its label, as indices
        into the flattened rows, and ``padded`` tells whether any text position is padding; without them the
        host waits for the GPU. ``visual_memory``, prepared or not, may replace ``pixel_values``. Without
        ``has_image`` every row has a picture. ``picture`` is the number of each row's picture, which is
        encoded once for all of them; without it row i has picture i.
        """
        router_weights = wanted = None
        if labels is not None:
            if supervised is None:
                supervised = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero()[:, 0]
            # The label of a position is its next token's; nothing follows the last.
            wanted = labels.flatten()[supervised + 1]
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.fusion == "ffn":
            seen = (pixel_values, has_image, picture)
            memory, router_weights = self._memory_of(embeds, *seen, visual_memory)
            self.set_memory(memory)
        elif self.config.fusion == "prefix" and pixel_values is not None:
            num_tokens = embeds.shape[1]
            seen = (pixel_values, has_image, picture)
            embeds, attention_mask = self._prepend_prefix(embeds, attention_mask, *seen)
            if supervised is not None:
                num_before = embeds.shape[1] - num_tokens
                supervised = supervised + (supervised // num_tokens + 1) * num_before
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            # The prefix of a row without a picture is hidden from the row's text.
            padded = None if padded is None else padded or has_image is not None

        inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        if wanted is None or supervised is None:
            kwargs.pop("return_dict", None)  # it is always one
            kept = logits_to_keep
            some = isinstance(kept, Tensor) or 0 < kept < embeds.shape[1]
            chooses = some and "logits_to_keep" in inspect.signature(self.language_model.forward).parameters
            kwargs |= {"logits_to_keep": kept} if chooses else {}
            out = self.language_model(**inputs, past_key_values=past_key_values, **kwargs)
            positions = kept if isinstance(kept, Tensor) else slice(-kept, None)
            return DehvfOutput(
                logits=out.logits[:, positions] if some and not chooses else out.logits,
                past_key_values=out.past_key_values,
                hidden_states=out.get("hidden_states"),
                attentions=out.get("attentions"),
                router_weights=router_weights,
            )
        with known_masks(self.language_model.config._attn_implementation, masked=padded):
            logits = self.logits_at(supervised, inputs)
        loss_sum = F.cross_entropy(logits.float(), wanted.to(logits.device), reduction="sum")
        return DehvfOutput(
            loss=loss_sum / max(1, len(wanted)),
            loss_sum=loss_sum,
            num_supervised=torch.full((), len(wanted), device=loss_sum.device),
            router_weights=router_weights,
        )

    def logits_at(
        self, chosen: Int[Tensor, " chosen"], inputs: Mapping[str, Tensor | None]
    ) -> Float[Tensor, "chosen vocab"]:
        """Logits of the decoder's ``inputs`` at the chosen positions of the flattened rows only.

        They come from the decoder's own forward, with fewer hidden states: between its layers and its logits
        a decoder may do more than apply its head, such as scaling, capping or normalising.
        """
        kept: list[Tensor] = []

        def keep_chosen(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            # As a single row: for a sliced 3-D tensor the CPU copies the head's weight per row.
            output.last_hidden_state = hidden.flatten(0, 1)[chosen.to(hidden.device)][None]
            kept.append(output.last_hidden_state)
            return output

        with self.get_decoder().register_forward_hook(keep_chosen):
            logits = self.language_model(**inputs, use_cache=False).logits
        if len(kept) != 1 or logits.shape[:2] != kept[0].shape[:2]:
            raise ModelError(
                f"{type(self.language_model).__name__} computes its logits from something other than the "
                "hidden states of its layers; it cannot be trained"
            )
        return logits[0]

    def _memory_of(
        self,
        embeds: Tensor,
        pixel_values: Tensor | None,
        has_image: Tensor | None,
        picture: Tensor | None,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The rows' memory: the one passed, that of the pictures, or zeros; and the fuser's weights."""
        router_weights = None
        if memory is None and pixel_values is not None:
            memory, router_weights = self.encode_images(pixel_values, has_image if picture is None else None)
            if picture is not None:
                _require_a_picture_a_row(picture, embeds)
                memory, router_weights = (_of_rows(x, picture, has_image) for x in (memory, router_weights))
        if memory is None:
            config = self.config
            memory = embeds.new_zeros(len(embeds), config.num_layers, config.num_slots, config.rank)
        _require_a_picture_a_row(memory, embeds)
        return memory, router_weights

    def _prepend_prefix(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        pixel_values: Tensor,
        has_image: Tensor | None,
        picture: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Puts the projected patches of the last block but one before the text; masked without a picture."""
        _require_a_picture_a_row(pixel_values if picture is None else picture, embeds)
        has_image = _present(embeds, has_image)
        if mask is None:
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        block = max(1, self.config.vision_config.num_hidden_layers - 1)
        patches = visual_features(self.vision_tower, pixel_values, [block])[:, 0, 1:]
        prefix = self.prefix_projector(patches)
        if picture is not None:
            prefix = _of_rows(prefix, picture, has_image)
        prefix = prefix * has_image.to(embeds.dtype)[:, None, None]
        seen = has_image.to(mask.dtype)[:, None].expand(prefix.shape[:2])
        return torch.cat([prefix.to(embeds.dtype), embeds], dim=1), torch.cat([seen, mask], dim=1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "pictures 3 height width"] | None = None,
        has_image: Bool[Tensor, " batch"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        picture: Int[Tensor, " batch"] | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "batch new_tokens"]:
        """Generates like ``GenerationMixin.generate``, but always returns the new tokens only.

        Prompts are padded on the left; ``visual_memory`` may be passed instead of pictures. ``picture`` as in
        ``forward``.
        """
        inputs = kwargs.pop("inputs", None)
        input_ids = inputs if input_ids is None else input_ids
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.fusion == "ffn":
            given = kwargs.get("visual_memory")
            memory, _ = self._memory_of(embeds, pixel_values, has_image, picture, given)
            kwargs["visual_memory"] = self.prepare_memory(memory)
        elif self.config.fusion == "prefix" and pixel_values is not None:
            seen = (pixel_values, has_image, picture)
            embeds, attention_mask = self._prepend_prefix(embeds, attention_mask, *seen)
        return super().generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
        )


def _version(tensor: Tensor | None) -> int:
    """A number that changes as the tensor is written to; 0 where torch does not count, or does not tell."""
    if tensor is None or torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def _present(rows: Tensor, has_image: Tensor | None) -> Tensor:
    if has_image is None:
        return rows.new_ones(len(rows), dtype=torch.bool)
    if len(has_image) != len(rows):
        raise ValueError(f"has_image is of {len(has_image)} rows, and there are {len(rows)}")
    return has_image


def _of_rows(
    encoded: Float[Tensor, "pictures ..."], picture: Int[Tensor, " batch"], has_image: Tensor | None
) -> Float[Tensor, "batch ..."]:
    """What was encoded of each row's picture; zeros for rows without one.

    In training by a product with a one-hot matrix: on a GPU the gradient of indexing is summed in an order
    that varies. Elsewhere by indexing, so that a picture that overflows stays with its own rows.
    """
    picture, present = picture.to(encoded.device), _present(picture, has_image).to(encoded.device)
    if not torch.is_grad_enabled():
        rows = encoded.index_select(0, picture)
        return torch.where(present.view(-1, *[1] * (rows.ndim - 1)), rows, 0)
    chosen = (picture[:, None] == torch.arange(len(encoded), device=picture.device)) & present[:, None]
    # A number beyond the pictures gives NaN: to refuse it, the host would have to wait for the device.
    exists = chosen.any(dim=1, keepdim=True) | ~present[:, None]
    matrix = torch.where(exists, chosen.to(encoded.dtype), torch.nan)
    return (matrix @ encoded.flatten(1)).unflatten(1, encoded.shape[1:])


def _require_a_picture_a_row(pictures: Tensor, embeds: Tensor) -> None:
    """Refuses one picture for several rows, which broadcasting would show to all of them."""
    if len(pictures) != len(embeds):
        raise ValueError(
            f"{len(pictures)} pictures for {len(embeds)} rows; pass one a row (see has_image), or picture"
        )


def refuse_incomplete(
    model: nn.Module, info: Mapping[str, Any], unexpected: Collection[str], source: str
) -> None:
    """Refuses a loaded model whose weights are not exactly those of its files, where transformers only warns.

    ``info`` is that of ``from_pretrained``; ``unexpected`` are stored weights that must not be ignored.
    Weights that are not finite are refused too, if they are on this rank.
    """
    missing = set(info["missing_keys"]) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if missing:
        raise ModelError(f"{source}: the checkpoint lacks {_named(missing)}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"{source}: {name} has shape {list(found)}, not {list(wanted)}")
    if unexpected:
        raise ModelError(
            f"{source}: holds {_named(unexpected)}, which its config.json has no place for; the model would "
            "not compute what it computed in training"
        )
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise ModelError(f"{source}: {name} holds values that are not finite")


def _is_finite(parameter: Any) -> bool:
    """Whether the local values are finite; under ZeRO-3 this rank's partition, without its padding."""
    tensor, share = parameter.detach(), getattr(parameter, "ds_tensor", None)
    if share is not None:
        start = share.numel() * torch.distributed.get_rank(getattr(parameter, "ds_process_group", None))
        tensor = share.detach().flatten()[: max(0, parameter.ds_numel - start)]
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return True
    # One pass, without a mask as large as the tensor.
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def _named(names: Collection[str]) -> str:
    return f"{len(names)} weights, {min(names)} among them"
