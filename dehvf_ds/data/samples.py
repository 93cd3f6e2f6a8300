"""Reads and decodes samples, and others of their shard in place of damaged ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset

from dehvf_ds.batch import Sample
from dehvf_ds.config import UserError
from dehvf_ds.data.examples import Examples
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.prompts import Task
from dehvf_ds.data.records import read_record
from dehvf_ds.data.shards import UNDECODABLE, DamagedSample, picture_name

PADDING_ROW = -1
"""Number of an example that is read for its shape alone."""

MAX_ATTEMPTS = 16
"""Samples that are tried in a damaged one's place."""


def read_sample(
    index: ShardIndex,
    row: int,
    *,
    epoch: int = 0,
    example: int = 0,
    caption: int | None = None,
    shorter_side: int | None = None,
    task: Task | None = None,
) -> Sample:
    """Reads and decodes one row.

    Args:
        index: the data set.
        row: the row's number.
        epoch: epoch in which it was drawn.
        example: its number among the epoch's examples.
        caption: number of the caption to learn; it becomes the record's field ``caption``.
        shorter_side: pixels that the transform will keep of the shorter side; lets large JPEGs decode faster.

        task: what the row must be for; None takes any.

    Raises:
        DamagedSample: the row is damaged, of another task, or lacks its picture.
    """
    members = index.read(row)
    where = f"{members['__url__']} ({members['__key__']})"
    try:
        checked = read_record({**members, "__url__": where})
    except DamagedSample as error:
        remedy = f"tools/build_shards.py index {index.directory} --overwrite --skip-bad"
        raise DamagedSample(
            f"{error}; build the shards again, or leave such samples out: {remedy}", error.reason
        ) from None
    if task is not None and checked.task != task:
        raise DamagedSample(f"{where}: a row for data.task {checked.task}, not {task}")
    record, name = checked.record, picture_name(members)
    picture = None if name is None else members[name]
    try:
        image = None if picture is None else decode_image(picture, shorter_side=shorter_side)
    except ValueError as error:
        message = f"{where}: {error}; repair the picture and build the shards again"
        raise DamagedSample(message, UNDECODABLE) from error
    if caption is not None:
        if caption >= len(record.get("captions", ())):
            raise DamagedSample(f"{where}: has fewer captions than its index says; make the index again")
        record["caption"] = record["captions"][caption]
    return Sample(key=members["__key__"], image=image, record=record, epoch=epoch, example=example)


@dataclass(frozen=True)
class DrawnSample:
    """A sample as it was drawn, or the one in its place.

    Attributes:
        sample: what is to be collated.
        damage: what was wrong with the sample that was drawn: (shard, message).
        is_padding: whether it only fills a micro-batch, so that nothing of it is supervised.
    """

    sample: Sample
    damage: tuple[str, str] | None = None
    is_padding: bool = False


class SampleReader(Dataset):
    """Examples by (epoch, number). A ``UserError`` is returned, for a worker's raise would wrap it."""

    def __init__(
        self, index: ShardIndex, examples: Examples, shorter_side: int, *, task: Task, replace_bad: bool
    ):
        """Reads no sample yet.

        Args:
            index: the data set.
            examples: which row and caption an example is.
            shorter_side: pixels that the transform will keep of the shorter side.
            task: rows of another are damaged ones.
            replace_bad: whether another sample of its shard takes a damaged one's place.
        """
        self._task: Task = task
        self._index = index
        self._examples = examples
        self._shorter_side = shorter_side
        self._replace_bad = replace_bad

    def __getitem__(self, drawn: tuple[int, int]) -> DrawnSample | UserError:
        epoch, example = drawn
        try:
            if example == PADDING_ROW:
                return DrawnSample(self._read(epoch, 0), is_padding=True)
            return DrawnSample(self._read(epoch, example))
        except DamagedSample as error:
            return self._read_other(epoch, example, error) if self._replace_bad else UserError(str(error))
        except UserError as error:
            return UserError(str(error))

    def _read(self, epoch: int, example: int) -> Sample:
        row, caption = self._examples.resolve(epoch, example)
        return read_sample(
            self._index,
            row,
            epoch=epoch,
            example=example,
            caption=caption,
            shorter_side=self._shorter_side,
            task=self._task,
        )

    def _read_other(self, epoch: int, example: int, damage: DamagedSample) -> DrawnSample | UserError:
        row, _ = self._examples.resolve(epoch, example)
        shard = self._index.locate(row)[0]
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                other = self._examples.alternative(example, attempt)
                return DrawnSample(self._read(epoch, other), (shard, str(damage)))
            except DamagedSample:
                continue
            except (UserError, IndexError):
                break
        return UserError(f"{damage} (nor could {MAX_ATTEMPTS - 1} others of its shard take its place)")
