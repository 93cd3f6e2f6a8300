"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands, counted over all ranks.

    Attributes:
        step: optimizer steps done, those skipped for gradients that are not finite included.
        samples: rows consumed.
        tokens: text tokens seen.
        skipped: steps that were not taken.
        skipped_in_a_row: of these, how many the last ones.
        unsupervised_rows: rows that had nothing to learn.
        replaced: damaged samples in whose place another stood.
        best_loss: lowest validation loss so far.
        best_score: highest score of the evaluations inside the run so far.
        best_step: step of the highest score; where nothing is scored, of the lowest validation loss.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    unsupervised_rows: int = 0
    replaced: int = 0
    best_loss: float | None = None
    best_score: float | None = None
    best_step: int | None = None
