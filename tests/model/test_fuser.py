from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dehvf_ds.model.fuser import HierarchicalFuser

BATCH, LAYERS, LEVELS, SLOTS, WIDTH, RANK = 3, 4, 5, 7, 16, 6


def build(router: str) -> tuple[HierarchicalFuser, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fuser that has left its start values, and a batch whose second row has no picture."""
    torch.manual_seed(0)
    fuser = HierarchicalFuser(LAYERS, LEVELS, WIDTH, router_dim=8, router=router)
    for parameter in fuser.parameters():
        parameter.data += torch.randn_like(parameter)
    classes = torch.randn(BATCH, LEVELS, WIDTH)
    return fuser, classes, torch.randn(BATCH, LEVELS, SLOTS, RANK), torch.tensor([True, False, True])


@pytest.mark.parametrize("router", ["layer", "static", "last"])
def test_fused_memory_is_the_weighted_sum_of_levels(router: str) -> None:
    fuser, *batch = build(router)
    memory, weights = fuser(*batch)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, LAYERS))
    expected = torch.einsum("blj,bjsr->blsr", weights, batch[1])
    torch.testing.assert_close(memory[[0, 2]], expected[[0, 2]])
    assert (memory[1] == 0).all()


def test_layer_router_weights_follow_their_formula() -> None:
    fuser, *batch = build("layer")
    _, weights = fuser(*batch)
    layer, row = 3, 2
    embedding = fuser.layer_embedding[layer]
    query = embedding + F.silu(embedding @ fuser.w_hidden) @ fuser.w_query
    scores = torch.stack([query @ (batch[0][row, j] @ fuser.w_key) for j in range(LEVELS)]) / 8**0.5
    torch.testing.assert_close(weights[row, layer], scores.softmax(0))
    assert not torch.allclose(weights[0, 0], weights[0, 1]), "the layer counts"
    assert not torch.allclose(weights[0, 0], weights[2, 0]), "and the picture"


def test_static_router_is_blind_to_the_picture() -> None:
    fuser, *batch = build("static")
    _, weights = fuser(*batch)
    torch.testing.assert_close(weights[0], weights[2])
    torch.testing.assert_close(weights[0], fuser.level_logits.softmax(-1))


def test_last_router_takes_the_deepest_level_without_parameters() -> None:
    fuser, *batch = build("last")
    memory, _ = fuser(*batch)
    torch.testing.assert_close(memory[0, 1], batch[1][0, -1])
    assert list(fuser.parameters()) == []


@pytest.mark.parametrize("router", ["layer", "static"])
def test_every_parameter_has_a_gradient_in_a_batch_without_pictures(router: str) -> None:
    fuser, classes, projected, _ = build(router)
    memory, _ = fuser(classes, projected.requires_grad_(), torch.zeros(BATCH, dtype=torch.bool))
    (memory + 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fuser.parameters())
