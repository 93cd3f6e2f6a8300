"""Rank-space reading of the visual memory against the FFN memory that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dehvf_ds.model.visual_ffn import MemoryReader, VisualFFN, prepare_memory, read_memory, read_prepared

NAMES = ("x", "memory", "gain_in", "gain_out", "w_query", "w_out", "key_positions", "value_positions")


def materialised(x, memory, gain_in, gain_out, w_query, w_out, key_positions, value_positions):
    """The plain reference: an FFN whose M hidden units have d-wide keys and values."""
    rank = memory.shape[-1]
    spread = ((x @ w_query).square().mean(dim=-1, keepdim=True) + 1e-8).sqrt()
    keys = ((memory + key_positions) * gain_in) @ w_query.T
    values = ((memory + value_positions) * gain_out) @ w_out
    hidden = F.silu(torch.einsum("btd,bmd->btm", x, keys) / spread / rank**0.5)
    return torch.einsum("btm,bmd->btd", hidden, values)


def tensors(batch=2, tokens=5, dim=24, slots=7, rank=6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, tokens, dim),
        "memory": (batch, slots, rank),
        "gain_in": (rank,),
        "gain_out": (rank,),
        "w_query": (dim, rank),
        "w_out": (rank, dim),
        "key_positions": (slots, rank),
        "value_positions": (slots, rank),
    }
    return {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}


def test_rank_space_equals_the_materialised_ffn_memory_forward_and_backward() -> None:
    mine, reference = tensors(), tensors()
    weights = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    out = read_memory(*mine.values())
    expected = materialised(*reference.values())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in NAMES:
        torch.testing.assert_close(mine[name].grad, reference[name].grad, rtol=1e-5, atol=1e-4)


def test_a_prepared_memory_is_read_as_the_plain_one() -> None:
    given = tensors()
    prepared = prepare_memory(*(given[name] for name in NAMES if name not in ("x", "w_query", "w_out")))
    assert prepared.shape == (2, 2, 7, 6)
    found = read_prepared(given["x"], prepared, given["w_query"], given["w_out"])
    torch.testing.assert_close(found, read_memory(*given.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.01, 0.14, 40.0])
def test_what_is_read_does_not_depend_on_the_size_of_the_ffn_inputs(size) -> None:
    given = tensors()
    expected = read_memory(*given.values())
    found = read_memory(given.pop("x") * size, *given.values())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_rank_space_keeps_no_wide_memory_for_backward() -> None:
    saved: list[int] = []
    inputs = tensors(dim=512, slots=64, rank=4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        read_memory(*inputs.values())
    # Keys or values would be batch x slots x dim; x itself is the widest tensor that may be kept.
    assert max(saved) <= inputs["x"].numel()


def test_the_branch_is_silent_at_the_start_and_needs_a_memory() -> None:
    reader = MemoryReader(dim=24, num_slots=7, rank=6)
    layer = VisualFFN(torch.nn.Linear(24, 24), reader, num_slots=7, rank=6)
    x = torch.randn(2, 5, 24)
    with pytest.raises(RuntimeError, match="no visual memory"):
        layer(x)
    layer.memory = torch.randn(2, 7, 6)
    assert torch.equal(layer(x), layer.ffn(x))


def test_the_shared_reader_is_registered_by_the_top_model_alone() -> None:
    layer = VisualFFN(torch.nn.Linear(24, 24), MemoryReader(24, 7, 6), num_slots=7, rank=6)
    assert set(dict(layer.named_parameters())) == {"gain_in", "gain_out", "ffn.weight", "ffn.bias"}
