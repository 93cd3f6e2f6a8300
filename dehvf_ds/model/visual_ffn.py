"""Dynamic embedding in the FFN: visual features as key/value memory, computed in rank space."""

from __future__ import annotations

from collections.abc import Sequence

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


def read_memory(
    x: Float[Tensor, "batch tokens dim"],
    memory: Float[Tensor, "batch slots rank"],
    gain_in: Float[Tensor, " rank"],
    gain_out: Float[Tensor, " rank"],
    w_query: Float[Tensor, "dim rank"],
    w_out: Float[Tensor, "rank dim"],
    key_positions: Float[Tensor, "slots rank"],
    value_positions: Float[Tensor, "slots rank"],
) -> Float[Tensor, "batch tokens dim"]:
    """Reads the visual memory for every token (ours).

    q = rms_norm(x W_q) * a;  A = silu(q (S + P_k)^T / sqrt(r));  result = ((A (S + P_v)) * b) W_o.

    It equals an FFN whose hidden units are the M slots, with keys ((S + P_k) * a) W_q^T, scores divided by
    the root mean square of x W_q, and values ((S + P_v) * b) W_o, without ever building those [slots, dim]
    matrices. ``gain_in`` is the scale a of the queries, ``gain_out`` the scale b of what is read.
    """
    query = _queries(x, w_query) * gain_in
    scores = query @ (memory + key_positions).transpose(1, 2) * memory.shape[-1] ** -0.5
    read = F.silu(scores) @ (memory + value_positions)
    return (read * gain_out) @ w_out


def prepare_memory(
    memory: Float[Tensor, "batch slots rank"],
    gain_in: Float[Tensor, " rank"],
    gain_out: Float[Tensor, " rank"],
    key_positions: Float[Tensor, "slots rank"],
    value_positions: Float[Tensor, "slots rank"],
) -> Float[Tensor, "batch 2 slots rank"]:
    """Keys and values as decoding reads them for every token: positions added, all scales multiplied in.

    keys = (S + P_k) * a / sqrt(r);  values = (S + P_v) * b.
    """
    keys = (memory + key_positions) * (gain_in * memory.shape[-1] ** -0.5)
    return torch.stack([keys, (memory + value_positions) * gain_out], dim=1)


def prepared_memory(
    memory: Float[Tensor, "batch layers slots rank"], reader: MemoryReader, ffns: Sequence[VisualFFN]
) -> Float[Tensor, "batch layers *slots rank"]:
    """What ``prepare_memory`` makes for every layer; the memory itself where weights are not at hand."""
    shared = (reader.key_positions, reader.value_positions)
    if any(p.is_meta or not p.numel() for p in (*shared, *(ffn.gain_in for ffn in ffns))):
        return memory
    prepared = [
        prepare_memory(one, *(p.to(one.device) for p in (ffn.gain_in, ffn.gain_out, *shared)))
        for ffn, one in zip(ffns, memory.unbind(dim=1), strict=True)
    ]
    return torch.stack(prepared, dim=1)


def read_prepared(
    x: Float[Tensor, "batch tokens dim"],
    prepared: Float[Tensor, "batch 2 slots rank"],
    w_query: Float[Tensor, "dim rank"],
    w_out: Float[Tensor, "rank dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """As ``read_memory``, of a memory that ``prepare_memory`` made: half as many operations a token."""
    keys, values = prepared.unbind(dim=1)
    return F.silu(_queries(x, w_query) @ keys.transpose(1, 2)) @ values @ w_out


def _queries(
    x: Float[Tensor, "batch tokens dim"], w_query: Float[Tensor, "dim rank"]
) -> Float[Tensor, "batch tokens rank"]:
    """x W_q at a root mean square of 1, so that the spread of the scores does not hang on the LLM.

    The inputs of an FFN have an RMS of 0.14 in SmolLM2 and of several in other LLMs.
    """
    return F.rms_norm(x @ w_query, w_query.shape[-1:], eps=QUERY_EPS)


class MemoryReader(nn.Module):
    """The reader's parameters that all LLM layers share: query and output maps, position memory.

    Registered once on the top model. ``w_out`` is zero at the start, so that the model starts as its
    frozen language model.

    Args:
        dim: width d of the language model.
        num_slots: visual tokens M of a level.
        rank: width r of the memory.
    """

    def __init__(self, dim: int, num_slots: int, rank: int) -> None:
        super().__init__()
        self.w_query = nn.Parameter(torch.randn(dim, rank) / dim**0.5)
        self.w_out = nn.Parameter(torch.zeros(rank, dim))
        self.key_positions = nn.Parameter(torch.randn(num_slots, rank) * 0.02)
        self.value_positions = nn.Parameter(torch.zeros(num_slots, rank))

    def forward(self, x: Tensor, memory: Tensor, gain_in: Tensor, gain_out: Tensor) -> Tensor:
        """Calls ``read_memory``, or ``read_prepared`` for a memory of four dimensions; shapes as there."""
        if memory.ndim == 4:
            return read_prepared(x, memory, self.w_query, self.w_out)
        return read_memory(
            x,
            memory,
            gain_in,
            gain_out,
            self.w_query,
            self.w_out,
            self.key_positions,
            self.value_positions,
        )


class VisualFFN(nn.Module):
    """Stands in the place of a decoder layer's FFN and adds what that layer reads from the picture.

    out = FFN(x) + visual(x). The memory is set by the top model's forward and stays until the next one,
    so that activation checkpointing recomputes with the same memory.

    Args:
        ffn: the layer's own FFN.
        reader: the shared reader; referenced, not registered, since it belongs to the top model.
        num_slots: visual tokens M of a level.
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
        """The layer's FFN plus the visual branch; only below the top model, which sets the memory."""
        if self.memory is None:
            raise RuntimeError("no visual memory is set; call the DEHVF model, not its language model")
        visual = self._reader[0](x, self.memory, self.gain_in, self.gain_out)
        return self.ffn(x) + visual.to(x.device)
