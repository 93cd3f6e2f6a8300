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

from dehvf_ds.batch import Batch, BatchFacts
from dehvf_ds.config import UnsupervisedError
from dehvf_ds.distributed import STOP_SIGNALS, PendingSum, World, all_reduce_sum

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
        counts: the micro-batches' facts, summed; at least 1 supervised token.
        num_substituted: damaged samples for which others were substituted.
        num_stopping: ranks that were asked to stop.
        router_weights: the router's weights in this rank's last micro-batch with a picture, averaged over its
            rows that have one; None without any, or if they were not asked for.
    """

    loss: float
    counts: BatchFacts
    num_substituted: int
    num_stopping: int
    router_weights: Float[Tensor, "layers feature_layers"] | None = None

    @property
    def rows_crc(self) -> int:
        """Equal in two runs whose step saw the same rows, on any ranks.

        ``Batch.checksum`` modulo 2 ** 24, which TensorBoard's fp32 holds exactly.
        """
        return self.counts.checksum % 2**24

    @property
    def padding_share(self) -> float:
        """Share of the positions that went through the model and were padding."""
        return 1 - self.counts.num_text_tokens / self.counts.num_positions


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: list[Batch],
    world: World,
    dtype: torch.dtype,
    *,
    seed: int,
    step: int,
    stopping: bool = False,
    record_router: bool = False,
) -> StepResult:
    """Forward and backward over one accumulation window, then the optimizer. Every rank must call it.

    Every supervised token of the global batch counts the same, wherever it is: the loss is the sum over all
    tokens divided by their number over all ranks. DeepSpeed averages gradients over ranks, hence the factor
    ``world.size``.

    The host waits for the device once, at the end, when it reads the loss; the ranks' counts travel beside
    the first forward. (DeepSpeed's own engine waits in ``backward`` and, for the gradients' norm, in the last
    ``step``.)

    ``micro_batches`` are this rank's share of the window, on the CPU; pictures are cast to ``dtype``;
    ``seed`` and ``step`` decide dropout; with ``record_router`` the router's weights are kept. A rank that is
    ``stopping`` takes the step all the same. UnsupervisedError, before any backward, if no row of any rank
    has a token to learn.
    """
    batches = [batch.with_facts() for batch in micro_batches]
    own = [sum(column) for column in zip(*(batch.count() for batch in batches), strict=True)]
    own += [sum(len(batch.substituted) for batch in batches), stopping]
    pending = PendingSum([float(number) for number in own], world.device)
    totals: list[int] = []
    own_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    routed = None
    for micro_step, batch in enumerate(batches):
        _seed(seed, step, micro_step, world.rank)
        output = engine(**batch.to(world.device, dtype).training_inputs())
        totals = totals or [int(total) for total in pending.wait()]
        *summed, num_substituted, num_stopping = totals
        counts = BatchFacts(*summed)
        if not counts.num_supervised:
            raise UnsupervisedError(
                f"step {step}: none of its {counts.num_rows} rows has a token to learn; the prompts fill all "
                "data.max_tokens, so raise it"
            )
        engine.backward(output.loss_sum * (world.size / counts.num_supervised), scale_wrt_gas=False)
        engine.step()
        own_loss += output.loss_sum.detach().double()
        if record_router and output.router_weights is not None and batch.count().num_pictured_rows:
            routed = output.router_weights.detach(), batch.has_image
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(own_loss)
    return StepResult(
        loss=own_loss.item() / counts.num_supervised,
        counts=counts,
        num_substituted=num_substituted,
        num_stopping=num_stopping,
        router_weights=None if routed is None else routed[0][routed[1].to(world.device)].mean(dim=0),
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
                batch = batch.with_facts()
                output = engine(**batch.to(world.device, dtype).training_inputs())
                own = [output.loss_sum.item(), float(batch.count().num_supervised), float(stop.requested)]
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
