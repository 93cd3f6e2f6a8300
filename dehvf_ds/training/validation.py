"""The loss on held-out rows, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dehvf_ds.batch import Batch
from dehvf_ds.config import UnsupervisedError
from dehvf_ds.distributed import World, all_reduce_sum
from dehvf_ds.training.signals import StopRequest


def validation_loss(
    engine: Any, batches: Iterable[Batch], world: World, dtype: torch.dtype, stop: StopRequest
) -> float | None:
    """Mean cross-entropy a supervised token over all ranks' rows. Every rank must call it.

    Args:
        engine: DeepSpeed engine around the model; left in training mode.
        batches: this rank's micro-batches, as many as every other rank's.
        world: this process's place.
        dtype: compute dtype, for the pictures.
        stop: a request to stop; all ranks end the validation together.

    Returns:
        The loss in nats, or None where the validation was ended early.

    Raises:
        UnsupervisedError: no row has a token to learn.
    """
    loss_sum, num_tokens = 0.0, 0.0
    engine.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                output = engine(**batch.to(world.device, dtype).inputs())
                own = [output.loss_sum.item(), float(batch.num_supervised()), float(stop.requested)]
                loss, tokens, stopping = all_reduce_sum(own, world.device)
                loss_sum, num_tokens = loss_sum + loss, num_tokens + tokens
                if stopping:
                    return None
    finally:
        engine.train()
    if not num_tokens:
        raise UnsupervisedError(
            "no row of data.val has a token to learn, so there is no validation loss; the prompts fill all "
            "data.max_tokens, so raise it"
        )
    return loss_sum / num_tokens
