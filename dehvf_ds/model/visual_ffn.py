"""Dynamic embedding in the FFN: visual features as key/value memory, computed in rank space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import Float

QUERY_EPS = 1e-8
"""Added to a query's mean square before its root."""

SCORE_SPREAD = 64.0
"""Start value of the queries' scale: how sharply a token tells the slots apart (ours, by a sweep)."""

READ_SIZE = 0.5
"""Start value of the read's scale times sqrt(M), since sums over M slots grow so (ours, likewise)."""


class MemoryReader(nn.Module):
    """The reader's parameters that all LLM layers share: query and output maps, position memory.

    Registered once on the top model. ``w_out`` is zero at the start, so that the model starts as its
    frozen language model.

    Args:
        dim: width d of the language model.
        num_slots: visual tokens M of a feature layer.
        rank: width r of the memory.
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
        memory: Float[Tensor, "batch *2 slots rank"],
        gain_in: Float[Tensor, " rank"],
        gain_out: Float[Tensor, " rank"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """Reads a layer's visual memory for every token (ours).

        q = rms_norm(x W_q) * a;  A = silu(q (S + P_k)^T / sqrt(r));  result = ((A (S + P_v)) * b) W_o.

        It equals an FFN whose hidden units are the M slots, with keys ((S + P_k) * a) W_q^T, scores divided
        by the root mean square of x W_q, and values ((S + P_v) * b) W_o, without ever building those
        [slots, dim] matrices. x W_q is normalised so that the spread of the scores does not hang on the LLM:
        the inputs of an FFN have an RMS of 0.14 in SmolLM2 and of several in other LLMs.

        Args:
            x: inputs of the layer's FFN.
            memory: S, or what ``prepare`` made of it, which takes half as many operations a token.
            gain_in: the layer's scale a of the queries.
            gain_out: the layer's scale b of what is read.
        """
        query = F.rms_norm(x @ self.w_query, self.w_query.shape[-1:], eps=QUERY_EPS)
        if memory.ndim == 4:
            keys, values = memory.unbind(dim=1)
            return F.silu(query @ keys.transpose(1, 2)) @ values @ self.w_out
        query = query * gain_in
        scores = query @ (memory + self.key_positions).transpose(1, 2) * memory.shape[-1] ** -0.5
        read = F.silu(scores) @ (memory + self.value_positions)
        return (read * gain_out) @ self.w_out

    def prepare(
        self,
        memory: Float[Tensor, "batch slots rank"],
        gain_in: Float[Tensor, " rank"],
        gain_out: Float[Tensor, " rank"],
    ) -> Float[Tensor, "batch 2 slots rank"]:
        """Keys (S + P_k) * a / sqrt(r) and values (S + P_v) * b, which decoding reads for every token."""
        to = memory.device
        keys = (memory + self.key_positions.to(to)) * (gain_in.to(to) * memory.shape[-1] ** -0.5)
        values = (memory + self.value_positions.to(to)) * gain_out.to(to)
        return torch.stack([keys, values], dim=1)


class VisualFFN(nn.Module):
    """Stands in the place of a decoder layer's FFN and adds what that layer reads from the picture.

    out = FFN(x) + visual(x). The top model's forward sets the memory, which stays until the next one, so that
    activation checkpointing recomputes with the same memory.

    Args:
        ffn: the layer's own FFN.
        reader: the shared reader; referenced, not registered, since it belongs to the top model.
        num_slots: visual tokens M of a feature layer.
        rank: width r of the memory.
    """

    def __init__(self, ffn: nn.Module, reader: MemoryReader, num_slots: int, rank: int) -> None:
        super().__init__()
        self.ffn = ffn
        self.gain_in = nn.Parameter(torch.full((rank,), SCORE_SPREAD))
        self.gain_out = nn.Parameter(torch.full((rank,), READ_SIZE * num_slots**-0.5))
        self._reader = (reader,)
        self.memory: Tensor | None = None

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The layer's FFN plus the visual branch."""
        if self.memory is None:
            raise RuntimeError("no visual memory is set; call the DEHVF model, not its language model")
        visual = self._reader[0](x, self.memory, self.gain_in, self.gain_out)
        return self.ffn(x) + visual.to(x.device)
