"""Random numbers as a pure function of what they are drawn for: no generator's state is kept or saved."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from jaxtyping import UInt64


class Purpose(IntEnum):
    """What random words are for. A change of a number changes what every run draws."""

    SHARDS = 0
    FIRST_PASS = 1
    SECOND_PASS = 2
    LEFT_OUT = 3
    STEPS = 4
    CAPTION = 5
    VIEW = 6


def random_words(
    seed: int, purpose: Purpose, epoch: int, group: int, number: int, count: int
) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit words; raw, for numpy promises those across versions, not ``Generator``'s methods.

    Args:
        seed: seed of the run; negative ones and those of more than 64 bits are cut to 64 bits.
        purpose: what the words are for.
        epoch: the epoch, or 0.
        group: stream or shard, or 0.
        number: block or window, or 0.
        count: number of words.
    """
    entropy = np.random.SeedSequence([seed & (2**64 - 1), int(purpose), epoch, group, number])
    return np.random.PCG64(entropy).random_raw(count)
