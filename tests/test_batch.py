from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler

import torch

from dehvf_ds.batch import IGNORE_INDEX, Batch, BatchFacts


def batch(rows: dict[str, list[int]], *, width: int = 6, left: bool = False) -> Batch:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, tokens in enumerate(rows.values()):
        where = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[place, where] = torch.tensor(tokens)
        mask[place, where] = 1
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=torch.full_like(ids, IGNORE_INDEX),
        pixel_values=torch.zeros(len(rows), 3, 2, 2),
        has_image=torch.ones(len(rows), dtype=torch.bool),
        keys=tuple(rows),
    )


def test_the_checksum_is_that_of_the_rows_wherever_they_stand() -> None:
    whole = batch({"a": [1, 2, 3], "b": [4, 0]})
    assert whole.checksum() == batch({"b": [4, 0], "a": [1, 2, 3]}, width=9, left=True).checksum()
    assert whole.checksum() == batch({"a": [1, 2, 3]}).checksum() + batch({"b": [4, 0]}).checksum()
    # Another text, another key, no key, a row less, or one twice are another sum.
    others = ({"a": [1, 2, 4], "b": [4, 0]}, {"a": [1, 2, 3], "c": [4, 0]}, {"a": [1, 2, 3]}, {"b": [4]})
    # A file's name may hold a byte that is no text.
    others += ({"a": [1, 2, 3], "b\udcff": [4, 0]},)
    bare = Batch(**whole.inputs())
    assert len({0, whole.checksum(), bare.checksum(), *(batch(rows).checksum() for rows in others)}) == 8


def test_without_last_drops_the_last_position() -> None:
    rows = batch({"a": [1, 2, 3], "b": [4]}, width=3, left=True).without_last()
    assert rows.input_ids.tolist() == [[1, 2], [0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1], [0, 0]]
    assert rows.labels.shape == (2, 2)
    assert rows.keys == ("a", "b")


def test_a_batch_knows_its_facts_before_it_moves() -> None:
    rows = batch({"a": [1, 2, 3], "b": [4, 5]}, width=4)
    rows.labels[0, 1:3] = torch.tensor([2, 3])
    rows.has_image[1] = False
    known = rows.with_facts()
    assert known.supervised is not None
    assert known.supervised.tolist() == [0, 1]
    facts = known.count()
    assert facts == rows.count() == known.to("meta").facts
    assert facts._replace(checksum=0) == BatchFacts(
        num_rows=2,
        num_pictures=2,
        num_supervised=2,
        num_text_tokens=5,
        num_positions=8,
        num_pairs=32,
        num_unsupervised_rows=1,
        num_pictured_rows=1,
        checksum=0,
    )
    assert known.with_facts() is known
    assert known.training_inputs()["padded"] is True
    assert "has_image" in known.training_inputs()
    assert known.without_last().facts is None
    whole = batch({"a": [1, 2], "b": [3, 4]}, width=2).with_facts().training_inputs()
    assert whole["padded"] is False
    assert "has_image" not in whole


def test_a_batch_travels_between_processes_with_one_shared_tensor() -> None:
    sent = batch({"a": [1, 2, 3], "b": [4, 5]}).with_facts()
    pickler = ForkingPickler(stream := io.BytesIO())
    pickler.dump(sent)
    assert stream.getvalue().count(b"rebuild_storage") == 1
    found = pickle.loads(stream.getvalue())
    assert (found.keys, found.facts) == (sent.keys, sent.facts)
    assert all(torch.equal(value, sent.inputs()[name]) for name, value in found.inputs().items())
    assert found.inputs().keys() == sent.inputs().keys()
