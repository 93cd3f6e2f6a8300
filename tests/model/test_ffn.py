"""Rank-space reading of the visual memory against the FFN memory that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dehvf_ds.model.ffn import MemoryReader, VisualFFN

BATCH, TOKENS, DIM, SLOTS, RANK = 2, 5, 24, 7, 6


def build(dim: int = DIM, slots: int = SLOTS, rank: int = RANK) -> tuple[MemoryReader, dict[str, Tensor]]:
    """A reader that has left its start values, and the tensors of one call."""
    torch.manual_seed(0)
    reader = MemoryReader(dim, slots, rank)
    for parameter in reader.parameters():
        parameter.data = torch.randn_like(parameter)
    shapes = {
        "x": (BATCH, TOKENS, dim),
        "memory": (BATCH, slots, rank),
        "gain_in": (rank,),
        "gain_out": (rank,),
    }
    return reader, {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def materialised(reader: MemoryReader, x, memory, gain_in, gain_out) -> Tensor:
    """The plain reference: an FFN whose M hidden units have d-wide keys and values."""
    spread = ((x @ reader.w_query).square().mean(dim=-1, keepdim=True) + 1e-8).sqrt()
    keys = ((memory + reader.key_positions) * gain_in) @ reader.w_query.T
    values = ((memory + reader.value_positions) * gain_out) @ reader.w_out
    hidden = F.silu(torch.einsum("btd,bmd->btm", x, keys) / spread / memory.shape[-1] ** 0.5)
    return torch.einsum("btm,bmd->btd", hidden, values)


def test_rank_space_equals_the_materialised_ffn_memory_forward_and_backward() -> None:
    results = []
    for read in (MemoryReader.__call__, materialised):
        reader, given = build()
        out = read(reader, **given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(p.grad for p in (*given.values(), *reader.parameters()))])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


def test_a_prepared_memory_is_read_as_the_plain_one() -> None:
    reader, given = build()
    prepared = reader.prepare(given["memory"], given["gain_in"], given["gain_out"])
    assert prepared.shape == (BATCH, 2, SLOTS, RANK)
    expected = reader(**given)
    torch.testing.assert_close(reader(**given | {"memory": prepared}), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.01, 0.14, 40.0])
def test_what_is_read_does_not_depend_on_the_size_of_the_ffn_inputs(size) -> None:
    reader, given = build()
    found = reader(**given | {"x": given["x"] * size})
    torch.testing.assert_close(found, reader(**given), rtol=1e-3, atol=1e-4)


def test_rank_space_keeps_no_wide_memory_for_backward() -> None:
    saved: list[int] = []
    reader, given = build(dim=512, slots=64, rank=4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        reader(**given)
    # Keys or values would be batch x slots x dim; x itself is the widest tensor that may be kept.
    assert max(saved) <= given["x"].numel()


def test_the_branch_is_silent_at_the_start_and_needs_a_memory() -> None:
    layer = VisualFFN(torch.nn.Linear(DIM, DIM), MemoryReader(DIM, SLOTS, RANK), SLOTS, RANK)
    x = torch.randn(BATCH, TOKENS, DIM)
    with pytest.raises(RuntimeError, match="no visual memory"):
        layer(x)
    layer.memory = torch.randn(BATCH, SLOTS, RANK)
    assert torch.equal(layer(x), layer.ffn(x))
