"""Inside the decoder's FFNs: the picture as a key/value memory (ours), and LoRA adapters by `peft`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
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

QUERY_EPS = 1e-8
"""Added to a query's mean square before the square root."""

SCORE_SPREAD = 32.0
"""Start value of ``scale_in``: how sharply a token distinguishes the slots (ours, from a sweep)."""

READ_SIZE = 0.25
"""Start value of ``scale_out`` times sqrt(M), as which a sum over M slots grows (ours, from a sweep)."""


def decoder_layers(language_model: PreTrainedModel) -> list[Any]:
    """The decoder's layers, each with an FFN of its own named ``mlp``."""
    found = getattr(language_model.get_decoder(), "layers", None)
    layers = list(found) if isinstance(found, nn.ModuleList) else []
    ffns = [getattr(layer, "mlp", None) for layer in layers]
    # An FFN shared by several layers would be wrapped several times.
    if not ffns or not all(isinstance(f, nn.Module) for f in ffns) or len({*map(id, ffns)}) < len(ffns):
        raise ModelError(
            f"{type(language_model).__name__} is not a decoder whose layers each have an FFN named `mlp` "
            "(Llama, Mistral and Qwen models are)"
        )
    return layers


class KeysAndValues(NamedTuple):
    """A layer's prepared memory in the form in which decoding reads it, see ``MemoryReader.split``."""

    keys: Float[Tensor, "batch rank slots"]
    values: Float[Tensor, "batch slots rank"]
    least_norm: Float[Tensor, ""] | None
    """``QUERY_EPS`` as a norm: queries are left as they are and scores are divided by their norms"""


class MemoryReader(nn.Module):
    """The parameters that all LLM layers read their memory with: query and output maps, position memory.

    Registered once, on the top model. ``w_out`` starts at zero, so that the model starts as its frozen
    language model.
    """

    def __init__(self, dim: int, num_slots: int, rank: int) -> None:
        super().__init__()
        self.w_query = nn.Parameter(torch.randn(dim, rank) / dim**0.5)
        self.w_out = nn.Parameter(torch.zeros(rank, dim))
        self.key_positions = nn.Parameter(torch.randn(num_slots, rank) * 0.02)
        self.value_positions = nn.Parameter(torch.zeros(num_slots, rank))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch slots rank"] | KeysAndValues,
        scale_in: Float[Tensor, " rank"],
        scale_out: Float[Tensor, " rank"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Reads a layer's visual memory S for every FFN input x, with the layer's scales a and b (ours).

        q = rms_norm(x W_q) * a;  A = silu(q K^T / sqrt(r));  result = ((A (S + P_v)) * b) W_o, where K is
        S + P_k less its mean over the slots.

        It equals an FFN whose hidden units are the M slots, with keys (K * a) W_q^T, scores divided by the
        root mean square of x W_q, and values ((S + P_v) * b) W_o, without ever building those [slots, dim]
        matrices. x W_q is normalised so that the spread of the scores does not depend on the LLM: the inputs
        of an FFN have an RMS of 0.14 in SmolLM2 and of several in other LLMs. Keys are centred because most
        of a slot is common to all of a picture: it says nothing of where to read, opened or shut all slots
        at once, and some seeds diverged by it.

        A prepared ``memory`` holds the scales already, which halves the operations a token.
        """
        query = x @ self.w_query
        if isinstance(memory, KeysAndValues):
            return self._read_prepared(query, memory) @ self.w_out
        query = F.rms_norm(query, self.w_query.shape[-1:], eps=QUERY_EPS) * scale_in
        scores = query @ _centred(memory + self.key_positions).transpose(1, 2) * memory.shape[-1] ** -0.5
        read = F.silu(scores) @ (memory + self.value_positions)
        return (read * scale_out) @ self.w_out

    def _read_prepared(self, query: Tensor, memory: KeysAndValues) -> Tensor:
        keys, values, least_norm = memory
        if least_norm is None:
            scores = torch.bmm(F.rms_norm(query, query.shape[-1:], eps=QUERY_EPS), keys)
        else:
            norms = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
            scores = torch.bmm(query, keys) / torch.hypot(norms, least_norm)
        return torch.bmm(F.silu(scores), values)

    def prepare(
        self,
        memory: Float[Tensor, "batch *layers slots rank"],
        scale_in: Float[Tensor, "*layers rank"],
        scale_out: Float[Tensor, "*layers rank"],
    ) -> Float[Tensor, "batch *layers 2 slots rank"]:
        """Keys K * a / sqrt(r) and values (S + P_v) * b, for decoding."""
        to = memory.device
        scale_keys = (scale_in.to(to) * memory.shape[-1] ** -0.5)[..., None, :]
        keys = _centred(memory + self.key_positions.to(to)) * scale_keys
        values = (memory + self.value_positions.to(to)) * scale_out.to(to)[..., None, :]
        return torch.stack([keys, values], dim=-3)

    @staticmethod
    def split(prepared: Float[Tensor, "batch 2 slots rank"]) -> KeysAndValues:
        """One layer's prepared memory as it is read: once for all tokens, not for each.

        On the CPU ``rms_norm`` is seven operations; in fp32, which cannot overflow, the scores are divided by
        the queries' norms instead, and the keys take the sqrt(r) that is between norm and RMS.
        """
        keys, values = prepared.unbind(dim=1)
        if not keys.is_cpu or keys.dtype != torch.float32:
            return KeysAndValues(keys.transpose(1, 2), values, None)
        rank = keys.shape[-1]
        least_norm = keys.new_tensor((rank * QUERY_EPS) ** 0.5)
        return KeysAndValues(keys.transpose(1, 2).contiguous() * rank**0.5, values, least_norm)


def _centred(keys: Float[Tensor, "*any slots rank"]) -> Float[Tensor, "*any slots rank"]:
    return keys - keys.mean(dim=-2, keepdim=True)


class VisualFFN(nn.Module):
    """Wraps a decoder layer's FFN: out = FFN(x) + what the layer reads from the picture.

    The top model's forward sets the memory, which stays until the next one, so that activation checkpointing
    recomputes with it. The shared reader belongs to the top model and is not registered here.
    """

    def __init__(self, ffn: nn.Module, reader: MemoryReader, num_slots: int, rank: int) -> None:
        super().__init__()
        self.ffn = ffn
        self.scale_in = nn.Parameter(torch.full((rank,), SCORE_SPREAD))
        self.scale_out = nn.Parameter(torch.full((rank,), READ_SIZE * num_slots**-0.5))
        self.read_by(reader)
        self.memory: Tensor | KeysAndValues | None = None

    def read_by(self, reader: Callable[..., Tensor]) -> None:
        """Sets what reads the memory: the shared reader, or a wrapper of it."""
        self._reader = (reader,)  # in a tuple, which registers no module

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Adds the visual branch to the layer's FFN."""
        if self.memory is None:
            raise RuntimeError("no visual memory is set; call the DEHVF model, not its language model")
        visual = self._reader[0](x, self.memory, self.scale_in, self.scale_out)
        return self.ffn(x) + visual.to(x.device)


def add_lora(language_model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Injects ``DehvfConfig.lora`` into FFNs that are not wrapped yet; their output starts at zero."""
    if not is_peft_available():
        raise ModelError("the FFN adapters of this model are not folded into its weights: install peft")
    # By full names: a bare name would also match maps outside the FFNs.
    names = {module: name for name, module in language_model.named_modules()}
    adapted = [
        names[_linear_map(layer.mlp, target)]
        for layer in decoder_layers(language_model)
        for target in lora["targets"]
    ]
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=adapted,
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, language_model, adapter_name=ADAPTER_NAME)


def _linear_map(ffn: nn.Module, target: str) -> nn.Linear:
    module = getattr(ffn, target, None)
    if isinstance(module, nn.Linear):
        return module
    if hasattr(ffn, "experts"):
        raise ModelError(
            "the FFNs are mixtures of experts, which take no FFN adapters; set model.lora.rank 0 to train "
            "the visual branch alone"
        )
    linear = [name for name, child in ffn.named_children() if isinstance(child, nn.Linear)]
    raise ModelError(f"the FFN has no linear map {target!r}; it has {', '.join(linear)}")


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' own parameters, not their frozen base layers'."""
    return [parameter for layer in _lora_layers(model).values() for parameter in _lora_pair(layer)]


def folded_weight(
    weight: Float[Tensor, "out in"],
    lora_a: Float[Tensor, "rank in"],
    lora_b: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """A frozen weight with its adapter added, in fp32: W + scaling B A."""
    return weight.float().addmm(lora_b.float(), lora_a.float(), alpha=scaling)


def fold_lora(model: nn.Module) -> None:
    """Replaces all adapters by folded linear maps; sums are rounded once, to the weight's dtype."""
    for name, layer in _lora_layers(model).items():
        base = layer.get_base_layer()
        lora_a, lora_b = (parameter.data for parameter in _lora_pair(layer))
        folded = folded_weight(base.weight.data, lora_a, lora_b, layer.scaling[ADAPTER_NAME])
        if not folded.isfinite().all():
            raise ModelError(f"{name}: folding the adapter gives values that are not finite")
        base.weight.data = folded.to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _lora_pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
