"""Damaged samples that others stood in for: told, and counted by shard."""

from __future__ import annotations

import sys
from collections import Counter

from dehvf_ds.batch import Batch
from dehvf_ds.distributed import World, gather_to_main

MAX_DAMAGE_LINES = 20


class DamageLog:
    """The damaged samples that this rank met: a line for each of the first ones, and counts by shard."""

    def __init__(self, world: World):
        """Starts empty."""
        self._world = world
        self._counts: Counter[str] = Counter()

    def add(self, micro_batches: list[Batch]) -> None:
        """Counts the batches' replaced samples and tells of them."""
        for shard, message in (damage for batch in micro_batches for damage in batch.replaced):
            if self._counts.total() < MAX_DAMAGE_LINES:
                print(f"replaced a damaged sample: {message}", file=sys.stderr, flush=True)
            self._counts[shard] += 1

    def by_shard(self) -> str:
        """The shards with the most damaged samples over all ranks; every rank must call it."""
        return ", ".join(f"{shard} {count}" for shard, count in self._total().most_common(8))

    def report(self) -> None:
        """Prints how many there were; every rank must call it."""
        total = self._total()
        if self._world.is_main:
            listed = ", ".join(f"{shard} {count}" for shard, count in total.most_common(8))
            line = f"replaced {total.total()} damaged samples; by shard: {listed}"
            print(line, file=sys.stderr, flush=True)

    def _total(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for shard, count in gather_to_main(list(self._counts.items()), self._world):
            total[shard] += count
        return total
