"""What the visual branch has learnt so far, in numbers: which depths each LLM layer sees, and how loudly."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dehvf_ds.training.state import gather_trainables


def level_metrics(model: Any, weights: Float[Tensor, "layers levels"] | None) -> dict[str, float]:
    """Level weights and gains by name, for the metrics. Every rank must call it.

    ``levels/mean/BLOCK``: mean weight of a vision level over the layers; ``levels/entropy/LAYER``: in nats,
    from 0 (one level alone) to log of their number; ``visual/gain/LAYER``: Frobenius norm of diag(b_l) W_o,
    zero at the start. Ours.

    Args:
        model: the model inside the engine.
        weights: level weights of some pictures, averaged over them; None leaves theirs out.
    """
    found = {} if weights is None else summarise_weights(weights, model.config.levels)
    parameters = model.trainable_parameters()
    gains = {n: p for n, p in parameters.items() if n.endswith(("gain_out", "reader.w_out"))}
    if gains:
        values = gather_trainables(gains)
        row_norms = values.pop("reader.w_out").norm(dim=1)
        for name, gain in values.items():
            layer = next(part for part in name.split(".") if part.isdigit())
            found[f"visual/gain/{int(layer):02d}"] = (gain * row_norms).norm().item()
    return found


def summarise_weights(
    weights: Float[Tensor, "layers levels"], blocks: tuple[int, ...] | list[int]
) -> dict[str, float]:
    """Mean weight of each vision block over the layers, and each layer's entropy over the blocks."""
    weights = weights.float().cpu()
    entropy = torch.special.entr(weights).sum(dim=1)
    means = {
        f"levels/mean/{block:02d}": mean
        for block, mean in zip(blocks, weights.mean(dim=0).tolist(), strict=True)
    }
    entropies = {f"levels/entropy/{layer:02d}": value for layer, value in enumerate(entropy.tolist())}
    return means | entropies
