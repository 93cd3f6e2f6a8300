"""DEHVF as a Hugging Face model: a frozen decoder, a frozen vision tower, and the branch between them."""

from __future__ import annotations

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

from .configuration import Bool, DehvfConfig, Float, Int, ModelError
from .features import PrefixProjector, Projector, visual_features
from .ffn import MemoryReader, VisualFFN, add_lora, decoder_layers, lora_parameters
from .fuser import HierarchicalFuser

IGNORE_INDEX = -100


@dataclass
class DehvfOutput(ModelOutput):
    """What a forward returns: losses where labels are given, else logits and what the decoder adds."""

    loss: Tensor | None = None
    """mean cross-entropy over the supervised tokens; 0 without any"""
    loss_sum: Tensor | None = None
    """its sum, fp32, which the trainer weighs over ranks and micro-steps"""
    num_tokens: Tensor | None = None
    """supervised tokens, an int64 scalar"""
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_weights: Tensor | None = None
    """the fuser's ``[batch, layers, feature_layers]``, when pictures were encoded"""


class DehvfForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """DEHVF over any HF decoder with an ``mlp`` a layer and any HF vision tower with hidden states.

    ``config.fusion`` selects the method: ``ffn`` embeds the pictures in every FFN and adds no token;
    ``prefix`` puts projected patches before the text; ``none`` sees no picture. LoRA adapters in the FFNs are
    on in all of them unless ``config.lora`` is None. At initial values ``ffn`` and ``none`` compute exactly
    what the language model computes. A backbone that is not given has random weights.
    """

    config_class = DehvfConfig
    config: DehvfConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
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
        # Every module of ours initialises itself and the backbones come with weights of their own.
        with no_init_weights():
            self.post_init()
        # Backbones may do without some weights that their own classes can do without; an export holds all.
        self._keys_to_ignore_on_load_missing = set()
        self._keys_to_ignore_on_load_unexpected = set()
        self.requires_grad_(False)
        for parameter in self.trainable_parameters().values():
            parameter.requires_grad_(True)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules of ours hold their start values from their constructors."""

    def recompute_layers(self) -> None:
        """Has backward recompute the decoder's layers, whose activations are not kept."""
        decoder = self.language_model
        # Renamed in transformers 5.23, which warns of the old name.
        enable = getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The exact set that trains, by name: projector, fuser, reader, scales and FFN adapters."""
        chosen = {id(p) for p in lora_parameters(self.language_model)}
        for name, module in self.named_modules():
            if name in ("projector", "fuser", "reader", "prefix_projector") or isinstance(module, VisualFFN):
                chosen |= {id(p) for p in module.parameters(recurse=not isinstance(module, VisualFFN))}
        return {name: p for name, p in self.named_parameters() if id(p) in chosen}

    def train(self, mode: bool = True) -> DehvfForConditionalGeneration:
        """Sets training mode; the frozen tower stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.config.fusion != "none":
            self.vision_tower.eval()
        return self

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads an export as ``PreTrainedModel.from_pretrained`` does, see ``refuse_incomplete``."""
        wants_info = kwargs.pop("output_loading_info", False)
        # Shapes are refused here, by name; transformers' own error names no tensor.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(source, *args, **kwargs)
        model, info = loaded
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
        """The visual memory of every LLM layer, zero on rows without a picture, and the fuser's weights.

        Of ``fusion: ffn``, once per picture. Without ``has_image`` all rows have one.
        """
        features = visual_features(self.vision_tower, pixel_values, self.config.feature_layers)
        if has_image is None:
            has_image = pixel_values.new_ones(len(pixel_values), dtype=torch.bool)
        return self.fuser(features[:, :, 0], self.projector(features), has_image)

    def prepare_memory(
        self, memory: Float[Tensor, "batch layers *slots rank"]
    ) -> Float[Tensor, "batch layers *slots rank"]:
        """Every layer's keys and values, ``[batch, layers, 2, slots, rank]``, read for every new token.

        A model whose weights are not all at hand (offloaded, partitioned) gets the memory as it is.
        """
        ffns = [layer.mlp for layer in decoder_layers(self.language_model)]
        needed = (self.reader.key_positions, self.reader.value_positions, *(ffn.scale_in for ffn in ffns))
        if memory.ndim == 5 or any(p.is_meta or not p.numel() for p in needed):
            return memory
        layers = zip(ffns, memory.unbind(dim=1), strict=True)
        return torch.stack([self.reader.prepare(one, f.scale_in, f.scale_out) for f, one in layers], dim=1)

    def set_memory(self, memory: Float[Tensor, "batch layers *slots rank"] | None) -> None:
        """Hands each layer its memory, prepared or not, until the next call."""
        layers = decoder_layers(self.language_model)
        # unbind, not an index a layer: the latter's backward fills a tensor of the whole size each time.
        slices = [None] * len(layers) if memory is None else memory.unbind(dim=1)
        for layer, memory_of_layer in zip(layers, slices, strict=True):
            layer.mlp.memory = memory_of_layer

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "batch 3 height width"] | None = None,
        has_image: Bool[Tensor, " batch"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        visual_memory: Float[Tensor, "batch layers *slots rank"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        supervised: Int[Tensor, " chosen"] | None = None,
        **kwargs: Any,
    ) -> DehvfOutput:
        """With ``labels`` losses alone are returned, else logits at every position, as ``generate`` needs.

        ``supervised`` names the positions of which logits make the loss, each one before its label's, in the
        rows laid end to end; None finds them, for which a GPU has to be waited for. ``visual_memory``,
        prepared or not, takes the place of pictures that are encoded already. Without either, rows are
        text-only. Without ``has_image`` every row's picture counts.
        """
        router_weights = wanted = None
        if labels is not None:
            if supervised is None:
                supervised = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero()[:, 0]
            # The label of a position is its next token's; nothing follows the last.
            wanted = labels.flatten()[supervised + 1]
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.fusion == "ffn":
            memory, router_weights = self._memory_of(embeds, pixel_values, has_image, visual_memory)
            self.set_memory(memory)
        elif self.config.fusion == "prefix" and pixel_values is not None:
            num_tokens = embeds.shape[1]
            embeds, attention_mask = self._prepend_prefix(embeds, attention_mask, pixel_values, has_image)
            if supervised is not None:
                num_before = embeds.shape[1] - num_tokens
                supervised = supervised + (supervised // num_tokens + 1) * num_before
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)

        if wanted is None or supervised is None:
            kwargs.pop("return_dict", None)  # it is always one
            out = self.language_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            return DehvfOutput(
                logits=out.logits,
                past_key_values=out.past_key_values,
                hidden_states=out.get("hidden_states"),
                attentions=out.get("attentions"),
                router_weights=router_weights,
            )
        logits = self.logits_at(supervised, embeds, attention_mask, position_ids)
        loss_sum = F.cross_entropy(logits.float(), wanted.to(logits.device), reduction="sum")
        count = torch.full((), len(wanted), device=loss_sum.device)
        loss = loss_sum / max(1, len(wanted))
        return DehvfOutput(loss=loss, loss_sum=loss_sum, num_tokens=count, router_weights=router_weights)

    def logits_at(
        self,
        chosen: Int[Tensor, " chosen"],
        embeds: Float[Tensor, "batch tokens dim"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "chosen vocab"]:
        """Logits at the chosen positions alone, by the decoder's own forward, on fewer hidden states.

        Between its layers and its logits a decoder may do more than apply its head: scale, cap, normalise.
        """
        kept: list[Tensor] = []

        def keep_chosen(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            # One row of all: a sliced 3-D tensor makes the CPU copy the head's weight per row.
            output.last_hidden_state = hidden.flatten(0, 1)[chosen.to(hidden.device)][None]
            kept.append(output.last_hidden_state)
            return output

        hook = self.get_decoder().register_forward_hook(keep_chosen)
        try:
            logits = self.language_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).logits
        finally:
            hook.remove()
        if len(kept) != 1 or logits.shape[:2] != kept[0].shape[:2]:
            raise ModelError(
                f"{type(self.language_model).__name__} makes its logits of something else than the hidden "
                "states of its layers; it cannot be trained"
            )
        return logits[0]

    def _memory_of(
        self, embeds: Tensor, pixel_values: Tensor | None, has_image: Tensor | None, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows' memory: given, of their pictures, or zeros; with the fuser's weights of pictures."""
        router_weights = None
        if memory is None and pixel_values is not None:
            memory, router_weights = self.encode_images(pixel_values, has_image)
        if memory is None:
            config = self.config
            memory = embeds.new_zeros(len(embeds), config.num_layers, config.num_slots, config.rank)
        _require_a_picture_a_row(memory, embeds)
        return memory, router_weights

    def _prepend_prefix(
        self, embeds: Tensor, mask: Tensor | None, pixel_values: Tensor, has_image: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Puts the projected patches of the block before the last before the text.

        Rows without a picture mask them and multiply them by 0.
        """
        _require_a_picture_a_row(pixel_values, embeds)
        if has_image is None:
            has_image = pixel_values.new_ones(len(pixel_values), dtype=torch.bool)
        if mask is None:
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        block = max(1, self.config.vision_config.num_hidden_layers - 1)
        patches = visual_features(self.vision_tower, pixel_values, [block])[:, 0, 1:]
        prefix = self.prefix_projector(patches) * has_image.to(embeds.dtype)[:, None, None]
        seen = has_image.to(mask.dtype)[:, None].expand(prefix.shape[:2])
        return torch.cat([prefix.to(embeds.dtype), embeds], dim=1), torch.cat([seen, mask], dim=1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "batch 3 height width"] | None = None,
        has_image: Bool[Tensor, " batch"] | None = None,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "batch new_tokens"]:
        """Generates as ``GenerationMixin.generate`` and returns the new tokens only, whatever ``fusion`` is.

        Prompts are padded on the left. Each picture is encoded once: every layer's keys and values are
        computed before the first token. ``visual_memory`` may be given in the pictures' place.
        """
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("generate needs prompts: input_ids or inputs_embeds")
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.fusion == "ffn":
            memory, _ = self._memory_of(embeds, pixel_values, has_image, kwargs.get("visual_memory"))
            kwargs["visual_memory"] = self.prepare_memory(memory)
        elif self.config.fusion == "prefix" and pixel_values is not None:
            embeds, attention_mask = self._prepend_prefix(embeds, attention_mask, pixel_values, has_image)
        return super().generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
        )


def _require_a_picture_a_row(pictures: Tensor, embeds: Tensor) -> None:
    """Refuses a single picture for several rows, which all of them would see by broadcasting."""
    if len(pictures) != len(embeds):
        raise ValueError(f"{len(pictures)} pictures for {len(embeds)} rows; a row has one, see has_image")


def refuse_incomplete(
    model: nn.Module, info: Mapping[str, Any], unexpected: Collection[str], source: str
) -> None:
    """Refuses a loaded model whose weights are not exactly those of its files: transformers only warns.

    Weights may be missing or of another shape by the ``info`` of ``from_pretrained``, ``unexpected`` (stored
    ones that the model must not do without), or not finite. Those on the meta device or on another rank are
    not looked at for their values.
    """
    missing = set(info["missing_keys"]) - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    if missing:
        raise ModelError(f"{source}: the checkpoint lacks {_named(missing)}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelError(f"{source}: {name} has shape {list(found)}, not {list(wanted)}")
    if unexpected:
        raise ModelError(
            f"{source}: holds {_named(unexpected)}, that its config.json has no place for; what it computed "
            "when it was trained is not what it would compute here"
        )
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise ModelError(f"{source}: {name} holds values that are not finite")


def _is_finite(parameter: Any) -> bool:
    """Whether the values at hand are; under ZeRO-3 this rank's share, without the padding of the last one."""
    tensor, share = parameter.detach(), getattr(parameter, "ds_tensor", None)
    if share is not None:
        start = share.numel() * torch.distributed.get_rank(getattr(parameter, "ds_process_group", None))
        tensor = share.detach().flatten()[: max(0, parameter.ds_numel - start)]
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return True
    # The extremes are finite unless a value is not: one pass, without a mask as large as the tensor.
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def _named(names: Collection[str]) -> str:
    return f"{len(names)} weights, {min(names)} among them"
