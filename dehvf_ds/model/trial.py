"""Tries backbones on small copies before their weights are loaded (ours).

Whether a decoder and a tower can be used is decided by what they compute, not by their names: a copy with
random weights, of the same classes and with the same constants, takes a fraction of a second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration import DehvfConfig, ModelError
from .features import hidden_states
from .modeling import DehvfForConditionalGeneration

NUM_LAYERS = 2
"""Layers of the decoder's copy."""

TOLERANCE = 1e-4
"""Largest difference of logits that counts as fp32 rounding, as a share of the largest logit."""

LOGIT_SPREAD = 8.0
"""Standard deviation that a copy's logits are scaled to, large enough for soft-capping to show."""


def scaled_down(config: PreTrainedConfig, *, num_layers: int | None = None) -> PreTrainedConfig:
    """A configuration of the same architecture, vocabulary and picture size, but 32 wide.

    It has ``num_layers``, or more to have one of each kind; None keeps their number. Heads keep their width
    if the rotary embedding has a factor for each pair of their values (Phi-3).
    """
    values = config.to_dict()
    kinds = values.get("layer_types") or [None]
    # The library's hybrids do not run without a layer of each kind.
    one_of_each = 1 + max(map(kinds.index, kinds))
    layers = min(max(num_layers or config.num_hidden_layers, one_of_each), config.num_hidden_layers)
    grouped = values.get("num_key_value_heads") not in (None, values.get("num_attention_heads"))
    head_dim = 16
    if any(_holds_list(values.get(name)) for name in ("rope_scaling", "rope_parameters")):
        head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    sizes = {
        "hidden_size": 2 * head_dim,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2,
        "head_dim": head_dim,
        "qk_rope_head_dim": 16,
        "num_hidden_layers": layers,
    }
    values |= {key: size for key, size in sizes.items() if values.get(key) is not None}
    for key, value in values.items():
        # One entry a layer, such as its kind of attention.
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            values[key] = value[:layers]
    values.pop("quantization_config", None)
    return type(config).from_dict(values)


def _holds_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and any(map(_holds_list, value.values())))


def try_backbones(config: DehvfConfig) -> None:
    """Refuses backbones that would not compute in the model what they compute alone.

    On small copies: the model at its start gives the decoder's own logits, with and without labels; every
    layer's FFN is reached; the tower gives a token a patch, in the patches' order, the same at each call.
    """
    # The run's own random numbers stay as they are, and every process draws the same ones here.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = copy.deepcopy(config)
        small.text_config = scaled_down(config.text_config, num_layers=NUM_LAYERS)
        small.vision_config = scaled_down(config.vision_config)
        decoder = _build(AutoModelForCausalLM, small.text_config)
        tower = None
        if config.fusion != "none":
            tower = _build(AutoModel, small.vision_config)
            _try_tower(tower, config.image_size, small.patch_size)
        _try_decoder(decoder, small, tower)


def _build(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with _refused(f"no scaled-down copy of a {config.model_type} model can be built"):
        return auto_class.from_config(config, dtype=torch.float32).eval()


def _try_tower(tower: PreTrainedModel, image_size: int, patch_size: int) -> None:
    kind, num_blocks = tower.config.model_type, tower.config.num_hidden_layers
    pixels = torch.randn(1, 3, image_size, image_size)
    changed = pixels.clone()
    changed[..., :patch_size, patch_size : 2 * patch_size] += 1  # the second patch of the first row
    with torch.no_grad(), _refused(f"the vision tower, a {kind} model, cannot see {image_size} pixels"):
        states, again, other = (hidden_states(tower, each) for each in (pixels, pixels, changed))
    if len(states) != num_blocks + 1:
        raise ModelError(f"a {kind} tower returns {len(states) - 1} hidden states, not {num_blocks}")
    if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, again, strict=True)):
        raise ModelError(
            f"a {kind} tower gives other features at each call (it masks or shuffles patches at random); "
            "set model.vision_tower to one that does not"
        )
    differing = (other[0] - states[0])[0].abs().amax(dim=-1) > 1e-6
    num_patches = (image_size // patch_size) ** 2
    if num_patches > 1 and differing[-num_patches:].nonzero().flatten().tolist() != [1]:
        raise ModelError(
            f"a {kind} tower does not return one token for each patch of {patch_size} pixels, row by row"
        )


def _try_decoder(decoder: PreTrainedModel, config: DehvfConfig, tower: PreTrainedModel | None) -> None:
    kind = decoder.config.model_type
    ids = torch.randint(0, min(decoder.config.vocab_size, 1000), (2, 6))
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    with _refused(f"the language model, a {kind} model, does not run by itself"), torch.no_grad():
        head = decoder.get_output_embeddings()
        if head is None:
            raise ModelError(f"a {kind} model has no LM head")
        for parameter in head.parameters():
            parameter *= LOGIT_SPREAD / decoder(input_ids=ids).logits.std().clamp(min=1e-6)
        own = decoder(input_ids=ids).logits
    model = DehvfForConditionalGeneration(config, decoder, tower).eval()
    # Without the prefix, which would change the decoder's input.
    seen = {} if config.fusion == "prefix" else {"pixel_values": pixels}
    with _refused(f"a {kind} decoder does not run with visual features in its FFNs"):
        _compare(own, model(input_ids=ids, **seen).logits, kind)
        if config.fusion == "ffn":
            model.set_memory(model.encode_images(pixels, None)[0])
        embeds = model.get_input_embeddings()(ids)
        _compare(
            own.flatten(0, 1), model.logits_at(torch.arange(ids.numel()), {"inputs_embeds": embeds}), kind
        )
        model(input_ids=ids, labels=ids, pixel_values=pixels).loss.backward()
    silent = [name for name, p in model.trainable_parameters().items() if p.grad is None]
    if silent:
        raise ModelError(
            f"a {kind} decoder does not use its layers' FFNs as modules: no gradient reaches {silent[0]} "
            f"and {len(silent) - 1} more"
        )


def _compare(expected: Tensor, found: Tensor, kind: str) -> None:
    share = float("inf")
    if expected.shape == found.shape:
        share = float((expected - found.detach()).abs().max()) / float(expected.abs().max())
    if not share <= TOLERANCE:
        raise ModelError(
            f"a {kind} decoder computes other logits from embeddings than from ids, or with fewer positions: "
            f"they differ by {share:.1e} of the largest, so training would minimise a different loss"
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{what}: {reason}") from None
