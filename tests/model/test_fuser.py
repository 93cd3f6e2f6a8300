from __future__ import annotations

import pytest
import torch

from dehvf_ds.model.fuser import HierarchicalFuser

BATCH, LAYERS, LEVELS, SLOTS, WIDTH, RANK = 3, 4, 5, 7, 16, 6


def build(router: str) -> HierarchicalFuser:
    torch.manual_seed(0)
    fuser = HierarchicalFuser(LAYERS, LEVELS, WIDTH, router_dim=8, router=router)
    for parameter in fuser.parameters():
        parameter.data += torch.randn_like(parameter)
    return fuser


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    classes = torch.randn(BATCH, LEVELS, WIDTH)
    return classes, torch.randn(BATCH, LEVELS, SLOTS, RANK), torch.tensor([True, False, True])


@pytest.mark.parametrize("router", ["layer", "static", "last"])
def test_fused_memory_is_the_weighted_sum_of_levels(router: str) -> None:
    classes, projected, has_image = inputs()
    memory, weights = build(router)(classes, projected, has_image)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, LAYERS))
    expected = sum(weights[0, 2, j] * projected[0, j] for j in range(LEVELS))
    torch.testing.assert_close(memory[0, 2], expected)
    assert (memory[1] == 0).all()


def test_layer_router_depends_on_layer_and_picture() -> None:
    classes, projected, has_image = inputs()
    _, weights = build("layer")(classes, projected, has_image)
    assert not torch.allclose(weights[0, 0], weights[0, 1])
    assert not torch.allclose(weights[0, 0], weights[2, 0])


def test_layer_router_weights_follow_their_formula() -> None:
    classes, projected, has_image = inputs()
    fuser = build("layer")
    _, weights = fuser(classes, projected, has_image)
    layer, row = 3, 2
    embedding = fuser.layer_embedding[layer]
    query = embedding + torch.nn.functional.silu(embedding @ fuser.w_hidden) @ fuser.w_query
    scores = torch.stack([query @ (classes[row, j] @ fuser.w_key) for j in range(LEVELS)]) / 8**0.5
    torch.testing.assert_close(weights[row, layer], scores.softmax(0))


def test_static_router_is_blind_to_the_picture() -> None:
    classes, projected, has_image = inputs()
    _, weights = build("static")(classes, projected, has_image)
    torch.testing.assert_close(weights[0], weights[2])


def test_last_router_takes_the_deepest_level_without_parameters() -> None:
    classes, projected, has_image = inputs()
    fuser = build("last")
    memory, _ = fuser(classes, projected, has_image)
    torch.testing.assert_close(memory[0, 1], projected[0, -1])
    assert list(fuser.parameters()) == []


@pytest.mark.parametrize("router", ["layer", "static"])
def test_every_parameter_has_a_gradient_in_a_batch_without_pictures(router: str) -> None:
    classes, projected, _ = inputs()
    fuser = build(router)
    memory, _ = fuser(classes, projected.requires_grad_(), torch.zeros(BATCH, dtype=torch.bool))
    (memory + 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fuser.parameters())
