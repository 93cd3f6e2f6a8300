"""The loss a token of an evaluation's rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from dehvf_ds.batch import Sample
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.loader import read_sample
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.distributed import World, all_reduce_sum
from dehvf_ds.evals.decode import summed_loss
from dehvf_ds.evaluation.questions import Questions
from dehvf_ds.model import DehvfForConditionalGeneration


def measure_loss(
    model: DehvfForConditionalGeneration,
    questions: Questions,
    collator: Collator,
    batch_size: int,
    world: World,
) -> dict[str, Any]:
    """The mean cross-entropy a supervised token, in nats: of every caption, or every problem's answer.

    Every rank must call it; each takes its own rows.

    Args:
        model: in evaluation mode.
        questions: the rows.
        collator: makes rows with their targets.
        batch_size: examples of one forward.
        world: this process's place.

    Returns:
        For ``metrics.json``: ``loss``; ``loss_num_tokens``; ``loss_num_left_out``, examples without a
        supervised token (a prompt as long as the row), or with a picture or a text that cannot be read. The
        loss is None
        where nothing at all is supervised or the sum is no finite number, and ``loss_reason`` says so.
    """
    left_out = 0

    def samples() -> Iterator[Sample]:
        nonlocal left_out
        for row in range(world.rank, questions.num_rows, world.size):
            num_captions = int(questions.index.captions[row])
            for caption in range(num_captions) if num_captions else (None,):
                try:
                    side = questions.collator.image_size
                    sample = read_sample(questions.index, row, caption=caption, shorter_side=side)
                    # Half a surrogate pair can be scored, but no tokenizer reads it.
                    str(sample.record.get("caption", "")).encode()
                except (DamagedSample, UnicodeEncodeError):
                    left_out += 1
                else:
                    yield sample

    loss_sum, num_tokens = 0.0, 0
    for group in _groups(samples(), batch_size):
        batch = collator(group)
        left_out += batch.num_unsupervised_rows()
        part, count = summed_loss(model, [batch])
        loss_sum, num_tokens = loss_sum + part, num_tokens + count
    loss_sum, total, total_left_out = all_reduce_sum(
        [loss_sum, float(num_tokens), float(left_out)], world.device
    )
    found: dict[str, Any] = {
        "loss": None,
        "loss_num_tokens": int(total),
        "loss_num_left_out": int(total_left_out),
    }
    if not total:
        return found | {"loss_reason": "no token of these rows is supervised; their prompts fill max_tokens"}
    if not math.isfinite(loss_sum):
        return found | {"loss_reason": f"its sum is {loss_sum}; try --dtype fp32"}
    return found | {"loss": loss_sum / total}


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group
