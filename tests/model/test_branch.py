"""The fuser's routers, and the rank-space read against the FFN memory that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dehvf_ds.model.features import HierarchicalFuser
from dehvf_ds.model.ffn import KeysAndValues, MemoryReader, VisualFFN

BATCH, TOKENS, DIM, LAYERS, LEVELS, SLOTS, WIDTH, RANK = 3, 5, 24, 4, 5, 7, 16, 6


def build_fuser(router: str) -> tuple[HierarchicalFuser, Tensor, Tensor, Tensor]:
    """A fuser that has left its start values, and a batch whose second row has no picture."""
    torch.manual_seed(0)
    fuser = HierarchicalFuser(LAYERS, LEVELS, WIDTH, router_dim=8, router=router)
    for parameter in fuser.parameters():
        parameter.data += torch.randn_like(parameter)
    classes = torch.randn(BATCH, LEVELS, WIDTH)
    return fuser, classes, torch.randn(BATCH, LEVELS, SLOTS, RANK), torch.tensor([True, False, True])


@pytest.mark.parametrize("router", ["layer", "static", "last"])
def test_fused_memory_is_the_weighted_sum_of_levels_and_reaches_every_parameter(router: str) -> None:
    fuser, *batch = build_fuser(router)
    memory, weights = fuser(*batch)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, LAYERS))
    expected = torch.einsum("blj,bjsr->blsr", weights, batch[1])
    torch.testing.assert_close(memory[[0, 2]], expected[[0, 2]])
    assert (memory[1] == 0).all()
    # In a batch without pictures, too.
    memory, _ = fuser(batch[0], batch[1].requires_grad_(), torch.zeros(BATCH, dtype=torch.bool))
    (memory + 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fuser.parameters())


def test_router_weights_follow_their_formulas() -> None:
    fuser, *batch = build_fuser("layer")
    _, weights = fuser(*batch)
    layer, row = 3, 2
    embedding = fuser.layer_embedding[layer]
    query = embedding + F.silu(embedding @ fuser.w_hidden) @ fuser.w_query
    scores = torch.stack([query @ (batch[0][row, j] @ fuser.w_key) for j in range(LEVELS)]) / 8**0.5
    torch.testing.assert_close(weights[row, layer], scores.softmax(0))
    assert not torch.allclose(weights[0, 0], weights[0, 1]), "the layer counts"
    assert not torch.allclose(weights[0, 0], weights[2, 0]), "and the picture"
    fuser, *batch = build_fuser("static")
    torch.testing.assert_close(fuser(*batch)[1], fuser.router_logits.softmax(-1).expand(BATCH, -1, -1))
    fuser, *batch = build_fuser("last")
    torch.testing.assert_close(fuser(*batch)[0][0, 1], batch[1][0, -1])
    assert list(fuser.parameters()) == []


def build_reader(
    dim: int = DIM, slots: int = SLOTS, rank: int = RANK
) -> tuple[MemoryReader, dict[str, Tensor]]:
    """A reader that has left its start values, and the tensors of one call."""
    torch.manual_seed(0)
    reader = MemoryReader(dim, slots, rank)
    for parameter in reader.parameters():
        parameter.data = torch.randn_like(parameter)
    shapes = {
        "x": (BATCH, TOKENS, dim),
        "memory": (BATCH, slots, rank),
        "scale_in": (rank,),
        "scale_out": (rank,),
    }
    return reader, {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def materialised(reader: MemoryReader, x, memory, scale_in, scale_out) -> Tensor:
    """The plain reference: an FFN whose M hidden units have d-wide keys and values."""
    spread = ((x @ reader.w_query).square().mean(dim=-1, keepdim=True) + 1e-8).sqrt()
    keys = memory + reader.key_positions
    keys = ((keys - keys.mean(dim=1, keepdim=True)) * scale_in) @ reader.w_query.T
    values = ((memory + reader.value_positions) * scale_out) @ reader.w_out
    hidden = F.silu(torch.einsum("btd,bmd->btm", x, keys) / spread / memory.shape[-1] ** 0.5)
    return torch.einsum("btm,bmd->btd", hidden, values)


def test_rank_space_equals_the_materialised_ffn_memory_forward_and_backward() -> None:
    results = []
    for read in (MemoryReader.__call__, materialised):
        reader, given = build_reader()
        out = read(reader, **given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(p.grad for p in (*given.values(), *reader.parameters()))])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


def test_a_prepared_memory_and_inputs_of_any_size_are_read_alike() -> None:
    reader, given = build_reader()
    prepared = reader.prepare(given["memory"], given["scale_in"], given["scale_out"])
    assert prepared.shape == (BATCH, 2, SLOTS, RANK)
    keys, values = prepared.unbind(dim=1)
    # As on the CPU, and as elsewhere and in half precision.
    divided, normalised = reader.split(prepared), KeysAndValues(keys.transpose(1, 2), values, None)
    assert divided.least_norm is not None
    assert reader.split(prepared.bfloat16()).least_norm is None
    for size in (0.0, 1e-5, 1e-3, 0.14, 1.0, 40.0):
        x = given["x"] * size
        expected = reader(**given | {"x": x})
        for memory in (divided, normalised):
            found = reader(**given | {"x": x, "memory": memory})
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if size >= 0.01:
            torch.testing.assert_close(expected, reader(**given), rtol=1e-3, atol=1e-4)


def test_rank_space_keeps_no_wide_memory_for_backward() -> None:
    saved: list[int] = []
    reader, given = build_reader(dim=512, slots=64, rank=4)
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
