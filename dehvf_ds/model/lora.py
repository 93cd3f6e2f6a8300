"""FFN adapters: LoRA by `peft`, inside the FFN of every decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .configuration import Float, ModelError

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
except ImportError:  # a merged model has no adapters and runs without
    if not TYPE_CHECKING:
        LoraLayer = ()

ADAPTER_NAME = "default"


def decoder_layers(language_model: PreTrainedModel) -> list[Any]:
    """The decoder's layers, each with an FFN of its own named ``mlp``."""
    found = getattr(language_model.get_decoder(), "layers", None)
    layers = list(found) if isinstance(found, nn.ModuleList) else []
    ffns = [getattr(layer, "mlp", None) for layer in layers]
    # One that several layers share would be wrapped several times.
    if not ffns or not all(isinstance(f, nn.Module) for f in ffns) or len({*map(id, ffns)}) < len(ffns):
        raise ModelError(
            f"{type(language_model).__name__} is not a decoder whose layers each have an FFN named `mlp` "
            "(Llama, Mistral and Qwen models are)"
        )
    return layers


def add_lora(language_model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Injects the adapters in place. What they add is zero at the start.

    Args:
        language_model: an HF decoder, FFNs not yet wrapped.
        lora: ``{"rank", "alpha", "dropout", "targets"}``.
    """
    if not is_peft_available():
        raise ModelError("the FFN adapters of this model are not folded into its weights: install peft")
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=_full_names(language_model, lora["targets"]),
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, language_model, adapter_name=ADAPTER_NAME)


def _full_names(language_model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Every adapted linear map by its full name: a bare one would also match maps outside the FFNs."""
    names = {module: name for name, module in language_model.named_modules()}
    found = []
    for layer in decoder_layers(language_model):
        for target in targets:
            module = getattr(layer.mlp, target, None)
            if not isinstance(module, nn.Linear):
                if hasattr(layer.mlp, "experts"):
                    raise ModelError(
                        "the FFNs are mixtures of experts, which take no FFN adapters; set model.lora.rank 0 "
                        "to train the visual branch alone"
                    )
                linear = [n for n, m in layer.mlp.named_children() if isinstance(m, nn.Linear)]
                raise ModelError(f"the FFN has no linear map {target!r}; it has {', '.join(linear)}")
            found.append(names[module])
    return found


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every LoRA layer below ``model``, by its module name; found by type."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' own parameters, not their frozen base layers'."""
    return [parameter for layer in lora_layers(model).values() for parameter in _lora_pair(layer)]


def lora_scaling(lora: dict[str, Any]) -> float:
    """What PEFT multiplies B A by: alpha / rank."""
    return lora["alpha"] / lora["rank"]


def folded_weight(
    weight: Float[Tensor, "out in"],
    lora_a: Float[Tensor, "rank in"],
    lora_b: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """The weight that does what a frozen weight and its adapter do together, in fp32: W + scaling B A."""
    return weight.float().addmm(lora_b.float(), lora_a.float(), alpha=scaling)


def fold_lora(model: nn.Module) -> None:
    """Puts folded linear maps in the place of all adapters; sums are rounded once, to the weight's dtype."""
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        lora_a, lora_b = (parameter.data for parameter in _lora_pair(layer))
        folded = folded_weight(base.weight.data, lora_a, lora_b, layer.scaling[ADAPTER_NAME])
        if not folded.isfinite().all():
            raise ModelError(f"{name}: folding the adapter gives values that are not finite")
        base.weight.data = folded.to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def _lora_pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
