"""What is said of answers that part."""

from __future__ import annotations

import pytest
import torch

from dehvf_ds.export.verify import same_answers


def answer(ids: list[int], logits: list[list[float]]):
    return torch.tensor([ids]), torch.tensor([logits])


FIRM = answer([0, 1, 2], [[0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])


def test_answers_that_agree() -> None:
    assert same_answers([FIRM, FIRM], [FIRM, FIRM]) == "2 of 2 greedy answers are the same"


@pytest.mark.parametrize(
    ("change", "near_ties"),
    # At the second position token 2 leads token 1 by 2.0; the logits differ by `change` at most.
    [(0.9, 0), (1.1, 1)],
)
def test_a_near_tie_is_a_margin_within_the_difference(change, near_ties) -> None:
    parted = answer([0, 1, 1], [[0.0, 3.0 + change, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    said = same_answers([FIRM, FIRM], [FIRM, parted])
    assert said == f"1 of 2 greedy answers are the same ({near_ties} near-ties among the others)"


def test_an_answer_that_only_ends_sooner_is_no_near_tie() -> None:
    longer = answer([0, 1, 2, 2], [[0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert "0 of 1 greedy answers are the same (0 near-ties" in same_answers([FIRM], [longer])
