"""COCO Captions: the official tokenizer and metrics, by `pycocoevalcap`."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dehvf_ds.config import UserError
from dehvf_ds.evals.coco_tokens import NO_JAVA, Tokens, java_error, ptb_tokens, simple_tokens

SPICE_PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What SPICE parses with; `pycocoevalcap` comes without and would download it."""

MAX_REASON_LENGTH = 240

_Scores = tuple[Sequence[Any], Sequence[Any]]
# Of each metric its score over the corpus, and its scores of the pictures in their order; not x100 yet.


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of one caption a picture, all x100.

    Attributes:
        corpus: each metric over the corpus: ``BLEU-1`` .. ``BLEU-4``, ``METEOR``, ``ROUGE-L``, ``CIDEr``,
            ``SPICE``, less what is missing.
        each: the same metrics of each picture, by its key. The corpus' BLEU is not their mean.
        missing: why a metric could not be computed, in one line, by its name.
        comparable: whether the captions were tokenized as in published results.
        num_empty: predictions without a word. They are scored like the others, not left out.
    """

    corpus: dict[str, float]
    each: dict[str, dict[str, float]]
    missing: dict[str, str]
    comparable: bool
    num_empty: int


def score_captions(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    tokenizer: Literal["ptb", "simple"] = "ptb",
) -> CaptionScores:
    """Scores captions by the official metrics; one that fails is named and does not take the others along.

    Args:
        references: human captions of each picture.
        predictions: one caption of each picture.
        tokenizer: ``ptb`` is the official one, in Java. ``simple`` needs no Java: lower case, split at white
            space, punctuation stripped from the ends of words. Its scores compare with no published ones.

    Raises:
        UserError: pictures that differ between the two or have no references, no Java runtime for ``ptb``,
            or no metric could be computed.
    """
    _check_pictures(references, predictions)
    tokenize = {"ptb": ptb_tokens, "simple": simple_tokens}[tokenizer]
    keys = sorted(references)
    truth = tokenize({key: references[key] for key in keys})
    guess = tokenize({key: [predictions[key]] for key in keys})

    corpus, missing = {}, {}
    each: dict[str, dict[str, float]] = {key: {} for key in keys}
    for names, compute in METRICS.items():
        try:
            # The package prints its progress to standard output.
            with contextlib.redirect_stdout(io.StringIO()):
                totals, rows = compute(truth, guess)
            if not all(math.isfinite(total) for total in totals):
                raise ValueError("the score is not a finite number")
            scores = [dict(zip(keys, map(float, row), strict=True)) for row in rows]
        except Exception as error:
            missing |= dict.fromkeys(names, _one_line(error))
            continue
        for name, total, by_key in zip(names, totals, scores, strict=True):
            corpus[name] = 100 * float(total)
            for key, value in by_key.items():
                each[key][name] = 100 * value
    if not corpus:
        raise UserError(f"no caption metric could be computed; {next(iter(missing.values()))}")
    return CaptionScores(
        corpus=corpus,
        each=each,
        missing=missing,
        comparable=tokenizer == "ptb",
        num_empty=sum(not captions[0] for captions in guess.values()),
    )


def unique_predictions(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Makes a mapping of ``(key, prediction)`` pairs.

    Raises:
        UserError: a picture has two predictions; a mapping would keep the last one without a word.
    """
    predictions, twice = {}, []
    for key, text in pairs:
        if key in predictions:
            twice.append(key)
        predictions[key] = text
    if twice:
        raise UserError(
            f"{len(twice)} predictions are of a picture that has one already, {twice[0]} the first"
        )
    return predictions


def _check_pictures(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> None:
    if not references:
        raise UserError("no picture to score")
    without = sorted(set(references) - set(predictions))
    unknown = sorted(set(predictions) - set(references))
    problems = [
        *([f"{len(without)} pictures have no prediction, {without[0]} the first"] if without else []),
        *([f"{len(unknown)} predictions have no references, {unknown[0]} the first"] if unknown else []),
        *(["none has both: are they of another split?"] if len(without) == len(references) else []),
    ]
    if problems:
        raise UserError("; ".join(problems))
    bare = sorted(key for key, captions in references.items() if not any(map(str.strip, captions)))
    if bare:
        raise UserError(f"{len(bare)} pictures have no reference caption, {bare[0]} the first")


def _bleu(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(truth, guess, verbose=0)


def _meteor(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.meteor.meteor import Meteor

    if shutil.which("java") is None:
        raise RuntimeError(f"needs a Java runtime and {NO_JAVA}")
    scorer = Meteor()
    process: subprocess.Popen[bytes] = scorer.meteor_p
    try:
        total, row = scorer.compute_score(truth, guess)
    except (OSError, ValueError) as error:
        # What is read from a process that died is no number; its own words tell more.
        raise RuntimeError(java_error(_end(process)) or f"Java ended: {error}") from error
    finally:
        _end(process)
        # A score that fails keeps the lock, and the scorer's __del__ would wait for it for ever.
        scorer.lock = threading.Lock()
    return [total], [row]


def _end(process: subprocess.Popen[bytes]) -> bytes:
    """Ends a process, closes its pipes and returns what is left of its standard error."""
    process.kill()
    return process.communicate()[1]


def _rouge(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.rouge.rouge import Rouge

    total, row = Rouge().compute_score(truth, guess)
    return [total], [row]


def _cider(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.cider.cider import Cider

    total, row = Cider().compute_score(truth, guess)
    return [total], [row]


def _spice(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent / "lib"
    absent = [name for name in SPICE_PARSER if not (folder / name).is_file()]
    if absent:
        raise RuntimeError(f"its parser is not there: {folder} lacks {' and '.join(absent)}")
    if shutil.which("java") is None:
        raise RuntimeError(f"needs a Java runtime and {NO_JAVA}")
    total, rows = spice.Spice().compute_score(truth, guess)
    return [total], [[row["All"]["f"] for row in rows]]


METRICS: dict[tuple[str, ...], Callable[[Tokens, Tokens], _Scores]] = {
    ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"): _bleu,
    ("METEOR",): _meteor,
    ("ROUGE-L",): _rouge,
    ("CIDEr",): _cider,
    ("SPICE",): _spice,
}


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    kind = "" if type(error) is RuntimeError and words else f"{type(error).__name__}: "
    return f"{kind}{words}"[:MAX_REASON_LENGTH]
