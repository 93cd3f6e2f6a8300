"""One optimizer step, and the validation loss: which token counts how much, over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dehvf_ds.batch import Batch
from dehvf_ds.config import UnsupervisedError
from dehvf_ds.distributed import World, all_reduce_sum, seed_micro_step
from dehvf_ds.training.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over all ranks.

    Attributes:
        loss: mean cross-entropy per supervised token, in nats.
        num_supervised: tokens that the loss was taken at; at least 1.
        num_tokens: text tokens that went through the model.
        num_unsupervised_rows: rows without a token to learn.
        num_substituted: damaged samples for which others were substituted.
        num_stopping: ranks that were asked to stop.
        rows_crc: equal in two runs whose step saw the same rows, on whatever ranks (``Batch.checksum``,
            modulo 2 ** 24, which TensorBoard's fp32 holds exactly).
        router_weights: the router's weights in this rank's last micro-batch with a picture, averaged over its
            pictures; None without any.
    """

    loss: float
    num_supervised: int
    num_tokens: int
    num_unsupervised_rows: int
    num_substituted: int
    num_stopping: int
    rows_crc: int
    router_weights: Float[Tensor, "layers feature_layers"] | None = None


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: list[Batch],
    world: World,
    dtype: torch.dtype,
    *,
    seed: int,
    step: int,
    stopping: bool = False,
) -> StepResult:
    """Forward and backward over one accumulation window, then the optimizer. Every rank must call it.

    Every supervised token of the global batch counts the same, wherever it is: the loss is the sum over all
    tokens divided by their number over all ranks. DeepSpeed averages gradients over ranks, hence the factor
    ``world.size``.

    Args:
        engine: the engine around the model.
        micro_batches: this rank's share of the window, on any device.
        world: this process's place.
        dtype: compute dtype, for the pictures.
        seed: the run's seed; with ``step`` it decides dropout.
        step: number of this optimizer step.
        stopping: whether this rank was asked to stop; the step is taken all the same.

    Raises:
        UnsupervisedError: no row of any rank has a token to learn; nothing was changed.
    """
    counts = (
        (
            b.num_supervised(),
            b.num_input_tokens(),
            b.num_unsupervised_rows(),
            len(b.substituted),
            b.checksum(),
        )
        for b in micro_batches
    )
    own = [float(sum(column)) for column in zip(*counts, strict=True)]
    num_supervised, num_tokens, unsupervised, substituted, checksum, num_stopping = all_reduce_sum(
        [*own, float(stopping)], world.device
    )
    if not num_supervised:
        rows = sum(len(batch.labels) for batch in micro_batches) * world.size
        raise UnsupervisedError(
            f"step {step}: none of its {rows} rows has a token to learn; the prompts fill all "
            "data.max_tokens, so raise it"
        )
    own_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    weights = None
    for micro_step, batch in enumerate(micro_batches):
        seed_micro_step(seed, step, micro_step, world.rank)
        output = engine(**batch.to(world.device, dtype).inputs())
        engine.backward(output.loss_sum * (world.size / num_supervised), scale_wrt_gas=False)
        engine.step()
        own_loss += output.loss_sum.detach().double()
        if output.router_weights is not None and batch.has_image.any():
            weights = output.router_weights.detach()[batch.has_image.to(world.device)].mean(dim=0)
    (loss_sum,) = all_reduce_sum([own_loss.item()], world.device)
    return StepResult(
        loss=loss_sum / num_supervised,
        num_supervised=int(num_supervised),
        num_tokens=int(num_tokens),
        num_unsupervised_rows=int(unsupervised),
        num_substituted=int(substituted),
        num_stopping=int(num_stopping),
        rows_crc=int(checksum) % 2**24,
        router_weights=weights,
    )


def validation_loss(
    engine: DeepSpeedEngine,
    batches: Iterable[Batch],
    world: World,
    dtype: torch.dtype,
    stop: StopRequest,
) -> float | None:
    """Mean cross-entropy per supervised token over all ranks' rows, in nats. Every rank must call it.

    Every rank has equally many ``batches``. After a request to ``stop`` all ranks end together, and the
    result is None. The engine is left in training mode.

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
