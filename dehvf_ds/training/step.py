"""One optimizer step, and the validation loss: which token counts how much, over micro-batches and ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dehvf_ds.batch import Batch
from dehvf_ds.config import UnsupervisedError
from dehvf_ds.distributed import STOP_SIGNALS, World, all_reduce_sum

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class StopRequest:
    """Whether a signal asked this process to stop; the trainer stops all ranks together after a step."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Takes over the stop signals."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over all ranks.

    Attributes:
        loss: mean cross-entropy per supervised token, in nats.
        num_supervised: tokens that the loss was taken at; at least 1.
        num_text_tokens: tokens that went through the model, without padding and pictures.
        num_unsupervised_rows: rows without a token to learn.
        num_substituted: damaged samples for which others were substituted.
        num_stopping: ranks that were asked to stop.
        rows_crc: equal in two runs whose step saw the same rows, on any ranks (``Batch.checksum`` modulo
            2 ** 24, which TensorBoard's fp32 holds exactly).
        router_weights: the router's weights in this rank's last micro-batch with a picture, averaged over its
            pictures; None without any.
    """

    loss: float
    num_supervised: int
    num_text_tokens: int
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

    ``micro_batches`` are this rank's share of the window; pictures are cast to ``dtype``; ``seed`` and
    ``step`` decide dropout. A rank that is ``stopping`` takes the step all the same. UnsupervisedError, with
    nothing changed, if no row of any rank has a token to learn.
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
    num_supervised, num_text, unsupervised, substituted, checksum, num_stopping = all_reduce_sum(
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
        _seed(seed, step, micro_step, world.rank)
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
        num_text_tokens=int(num_text),
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
    result is None. UnsupervisedError if no row has a token to learn.
    """
    loss_sum, num_supervised = 0.0, 0.0
    engine.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                output = engine(**batch.to(world.device, dtype).inputs())
                own = [output.loss_sum.item(), float(batch.num_supervised()), float(stop.requested)]
                loss, supervised, stopping = all_reduce_sum(own, world.device)
                loss_sum, num_supervised = loss_sum + loss, num_supervised + supervised
                if stopping:
                    return None
    finally:
        engine.train()
    if not num_supervised:
        raise UnsupervisedError(
            "no row of data.val has a token to learn, so there is no validation loss; the prompts fill all "
            "data.max_tokens, so raise it"
        )
    return loss_sum / num_supervised


def _seed(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds torch's generators with where the run is, so that no generator state need be saved.

    Ranks and micro-steps draw different dropout masks; the same place in a run draws the same ones.
    """
    entropy = np.random.SeedSequence([seed & (2**64 - 1), step, micro_step, rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
