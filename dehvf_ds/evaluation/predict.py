"""The predictions of all rows: their directory, their cache, which rank makes which; and the loss."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dehvf_ds.batch import Sample
from dehvf_ds.config import UserError, require
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.dataset import Prediction, Questions, digest_of
from dehvf_ds.evaluation.decode import summed_loss
from dehvf_ds.model import DehvfForConditionalGeneration

METRICS_NAME = "metrics.json"
CACHE = ".answers-{}"
TERMS_NAME = "terms.json"

_COMMON_TERMS = ("protocol", "decoding", "num_samples")

PROGRESS_LINES = 20
"""Lines of progress that rank 0 prints."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one prediction per row."""

    metrics: dict[str, Any]
    """for ``metrics.json``"""
    numbers: dict[str, float]
    """those that make curves, x100"""
    scores: list[dict[str, float]]
    """of each row, for its line of ``predictions.jsonl``"""
    summary: list[str]
    """lines for the console"""


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in groups of ``size``; the last may be smaller."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def terms_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies an evaluation in its ``metrics.json``; not the paths of model and data."""
    terms = {name: report.get(name) for name in _COMMON_TERMS}
    return terms | {name: report.get(name, {}).get("sha256") for name in ("model", "data")}


class PredictionCache:
    """The predictions of an unfinished evaluation, by row; every rank appends to its own file.

    The directory's name is a digest of all that a prediction depends on.
    """

    def __init__(self, output: Path, terms: Mapping[str, Any], rank: int):
        self.directory = output / CACHE.format(digest_of(terms))
        self._path = self.directory / f"rank-{rank:05d}.jsonl"

    def read(self) -> dict[int, Prediction]:
        """All ranks' predictions by row, without the torn last line of a killed rank."""
        found: dict[int, Prediction] = {}
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row, prediction = json.loads(line)
                except (ValueError, TypeError):
                    continue
                found[row] = prediction
        return found

    def add(self, rows: Sequence[int], predictions: Sequence[Prediction]) -> None:
        """Appends this rank's predictions of some rows."""
        lines = [json.dumps(pair) + "\n" for pair in zip(rows, predictions, strict=True)]
        with writing(self._path):
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            with self._path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + "".join(lines))

    def remove(self) -> None:
        """Removes all ranks' files."""
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Creates the folder of a file that is written inside; an ``OSError`` becomes a line with its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def claim_directory(parent: Path, name: str, report: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """Creates the directory of an evaluation and marks it as taken; returns it, and notes for the user.

    It is ``parent/name``, or with a digest behind the name if an evaluation of other data, another model or
    other settings is there, finished or not. Results are removed in one case: model or data have changed
    since, at the same path. ``report`` is what will be written into ``metrics.json``.
    """
    terms = terms_of(report)
    digest = digest_of(terms)
    with writing(parent / name), (parent / ".claims").open("w") as lock:
        # Of two that start together only one may find a place free. Not all network file systems lock.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        held = {place: _held(place) for place in (parent / name, *sorted(parent.glob(f"{name}-*")))}
        same = [p for p in held if terms in map(terms_of, held[p].values())]
        known = [p for p in held if held[p] or p.name == name]
        free = [p for p in known if all(_is_outdated(h, report) for h in held[p].values())]
        place = [*same, *free, parent / f"{name}-{digest}"][0]
        outdated = [path for path, h in held.get(place, {}).items() if _is_outdated(h, report)]
        for path in outdated:
            path.unlink()
            if path.name == TERMS_NAME:
                shutil.rmtree(path.parent)
        mark = place / CACHE.format(digest) / TERMS_NAME
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(report), encoding="utf-8")
    notes = []
    if outdated:
        notes.append(f"{place}: results of an earlier model or earlier data are replaced")
    if place.name != name:
        notes.append(
            f"{parent / name} holds other data or settings; this evaluation is written to {place.name}"
        )
    return place, notes


def _held(directory: Path) -> dict[Path, dict[str, Any]]:
    """The files that describe evaluations here, finished or not; {} for one that cannot be understood."""
    found = {}
    for path in (directory / METRICS_NAME, *directory.glob(CACHE.format("*") + f"/{TERMS_NAME}")):
        # A file that was cut short holds nothing.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            described = isinstance(content, dict) and [content.get(name) for name in ("model", "data")]
            found[path] = content if described and all(isinstance(d, dict) for d in described) else {}
    return found


def _is_outdated(held: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Whether it is the same evaluation, of a model or data that have changed at their place."""
    return terms_of(held) != terms_of(report) and _places_of(held) == _places_of(report)


def _places_of(report: Mapping[str, Any]) -> list[Any]:
    """``terms_of`` with paths instead of hashes."""
    names = (("model", "path"), ("data", "path"), ("data", "images"))
    paths = [report.get(part, {}).get(name) for part, name in names]
    terms = [report.get(name) for name in _COMMON_TERMS]
    return terms + [path and Path(path).resolve() for path in paths]


def predict_rows(
    lengths: Sequence[int],
    ask: Callable[[Sequence[int]], Sequence[Prediction]],
    cache: PredictionCache,
    world: World,
    batch_size: int,
) -> list[Prediction]:
    """Asks the rows that are not in the cache, the longest prompts first. Every rank must call it.

    So the rows of a batch are of similar length, and a batch that does not fit into memory fails at the
    start. Returns the predictions in the rows' order on rank 0, else nothing.
    """
    # Rank 0 alone, before any rank writes.
    done = on_main(world, cache.read)
    left = sorted((row for row in range(len(lengths)) if row not in done), key=lambda row: -lengths[row])
    own = left[world.rank :: world.size]
    if done and world.is_main:
        print(f"resuming after {len(done)} of {len(lengths)} rows", flush=True)
    answered: list[tuple[int, Prediction]] = []
    for rows in in_batches(own, batch_size):
        predictions = ask(rows)
        cache.add(rows, predictions)
        before = len(answered)
        answered += zip(rows, predictions, strict=True)
        if world.is_main and before * PROGRESS_LINES // len(own) < len(answered) * PROGRESS_LINES // len(own):
            print(f"answered {len(answered)} of this rank's {len(own)} rows", flush=True)
    gathered = gather_to_main(answered, world)
    if not world.is_main:
        return []
    found = sorted([*done.items(), *gathered], key=lambda pair: pair[0])
    message = f"{len(found)} answers to {len({row for row, _ in found})} of {len(lengths)} rows"
    complete = [row for row, _ in found] == list(range(len(lengths)))
    require(complete, f"{cache.directory}: {message}; remove it")
    return [prediction for _, prediction in found]


def measure_loss(
    model: DehvfForConditionalGeneration, questions: Questions, batch_size: int, world: World
) -> dict[str, Any]:
    """Mean cross-entropy per supervised token, in nats, of every caption or answer. All ranks must call it.

    Returns entries of ``metrics.json``. ``loss_num_left_out`` counts examples without a supervised token (a
    prompt as long as the row), or with a picture or a text that cannot be read. The loss is None where
    nothing is supervised or the sum is not finite, and ``loss_reason`` says so.
    """
    loss_sum, num_tokens, left_out = 0.0, 0, 0

    def samples() -> Iterator[Sample]:
        nonlocal left_out
        for row in range(world.rank, questions.num_rows, world.size):
            num_captions, side = int(questions.index.captions[row]), questions.targets.image_size
            decoded: dict[bytes, Image.Image] = {}
            for caption in range(num_captions) if num_captions else (None,):
                try:
                    sample = read_sample(
                        questions.index, row, caption=caption, shorter_side=side, decoded=decoded
                    )
                    # A lone surrogate can be scored, but no tokenizer reads it.
                    str(sample.record.get("caption", "")).encode()
                except (DamagedSample, UnicodeEncodeError):
                    left_out += 1
                else:
                    yield sample

    for group in in_batches(samples(), batch_size):
        batch = questions.targets(group)
        left_out += batch.num_unsupervised_rows()
        part, count = summed_loss(model, batch)
        loss_sum, num_tokens = loss_sum + part, num_tokens + count
    loss_sum, total, left_out = all_reduce_sum([loss_sum, float(num_tokens), float(left_out)], world.device)
    found = {"loss": None, "loss_num_tokens": int(total), "loss_num_left_out": int(left_out)}
    if not total:
        return found | {"loss_reason": "no token of these rows is supervised; their prompts fill max_tokens"}
    if not math.isfinite(loss_sum):
        return found | {"loss_reason": f"its sum is {loss_sum}; try --dtype fp32"}
    return found | {"loss": loss_sum / total}
