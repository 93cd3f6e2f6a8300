"""COCO Captions: the official tokenizer and metrics, by `pycocoevalcap`."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from dehvf_ds.config import UserError
from dehvf_ds.evals.coco_tokens import NO_JAVA, Tokens, bounded_java, ptb_tokens, simple_tokens
from dehvf_ds.evals.meteor import score_meteor

CAPTION_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")

SPICE_PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What SPICE parses with; `pycocoevalcap` comes without and would download it."""

MAX_REASON_LENGTH = 240

_Scores = tuple[Sequence[Any], Sequence[Any]]
# Of each metric its score over the corpus, and its scores of the pictures in their order; not x100 yet.


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of one caption a picture, all x100.

    Attributes:
        corpus: each metric over the corpus: of ``CAPTION_METRICS`` those that could be computed.
        each: the same metrics of each picture, by its key, as the package gives them. The corpus' BLEU is not
            their mean.
        missing: why a metric has no value, in one line, by its name: it failed, or the captions define none.
        comparable: whether the captions were tokenized as in published results.
        num_empty: predictions without a word. They are scored like the others, not left out.
    """

    corpus: dict[str, float]
    each: dict[str, dict[str, float]]
    missing: dict[str, str]
    comparable: bool
    num_empty: int


class References:
    """Human captions, tokenized and looked at before anything is decoded."""

    def __init__(
        self, captions: Mapping[str, Sequence[str]], *, tokenizer: Literal["ptb", "simple"] = "ptb"
    ) -> None:
        """Tokenizes the captions.

        A caption without a word, such as "...", is left out: to ROUGE-L an empty answer would equal it.

        Args:
            captions: of each picture, by its key.
            tokenizer: ``ptb`` is the official one, in Java. ``simple`` needs no Java: lower case, split at
                white space, punctuation stripped from the ends of words. Its scores compare with no
                published ones.

        Raises:
            UserError: there is no picture, one has no caption with a word, or ``ptb`` cannot be run.
        """
        if not captions:
            raise UserError("no picture to score")
        if find_spec("pycocoevalcap") is None:
            raise UserError(
                "captions are scored by pycocoevalcap, which is not there; pip install pycocoevalcap"
            )
        _refuse_bare(captions)
        self._tokenize = {"ptb": ptb_tokens, "simple": simple_tokens}[tokenizer]
        self._comparable = tokenizer == "ptb"
        all_tokens = self._tokenize({key: captions[key] for key in sorted(captions)})
        self._truth: Tokens = {key: [c for c in group if c] for key, group in all_tokens.items()}
        self.num_wordless = sum(map(len, all_tokens.values())) - sum(map(len, self._truth.values()))
        """Captions that were left out."""
        _refuse_bare(self._truth)

    def score(self, predictions: Mapping[str, str]) -> CaptionScores:
        """Scores captions by the official metrics; one that fails does not take the others along.

        Args:
            predictions: one caption of each picture.

        Raises:
            UserError: pictures that differ from those of the references, or no metric could be computed.
        """
        _check_pictures(self._truth, predictions)
        keys = list(self._truth)
        guess = self._tokenize({key: [predictions[key]] for key in keys})
        missing = _undefined(self._truth, guess)
        corpus: dict[str, float] = {}
        each: dict[str, dict[str, float]] = {key: {} for key in keys}
        for names, compute in METRICS.items():
            if all(name in missing for name in names):
                continue
            try:
                # The package prints its progress to standard output.
                with contextlib.redirect_stdout(io.StringIO()), bounded_java(6 * len(keys)):
                    totals, rows = compute(self._truth, guess)
                scores = [dict(zip(keys, map(float, row), strict=True)) for row in rows]
                if not all(map(math.isfinite, (*totals, *(v for row in scores for v in row.values())))):
                    raise ValueError("the score is not a finite number")
            except Exception as error:
                missing |= dict.fromkeys(names, _one_line(error))
                continue
            for name, total, by_key in zip(names, totals, scores, strict=True):
                if name not in missing:
                    corpus[name] = 100 * float(total)
                    for key, value in by_key.items():
                        each[key][name] = 100 * value
        if not corpus:
            raise UserError(
                f"no caption metric could be computed; {'; '.join(dict.fromkeys(missing.values()))}"
            )
        return CaptionScores(
            corpus=corpus,
            each=each,
            missing=missing,
            comparable=self._comparable,
            num_empty=sum(not captions[0] for captions in guess.values()),
        )


def _undefined(truth: Tokens, guess: Tokens) -> dict[str, str]:
    """Metrics that have no value on these captions, though the package gives a number, and why."""
    found = {}
    longest = max(len(captions[0].split()) for captions in guess.values())
    for length in range(1, 5):
        if longest < length:
            # Its precision is that of no sequence at all; the package takes one millionth for it.
            words = "a word" if length == 1 else f"{length} words"
            found[f"BLEU-{length}"] = f"no answer has {words}"
    if not _weighs_words(truth):
        reason = "with one picture" if len(truth) == 1 else "where all pictures have the same references"
        found["CIDEr"] = f"{reason} every word weighs nothing; evaluate more pictures"
    return found


def _weighs_words(truth: Tokens) -> bool:
    """Whether a reference has a sequence that is not every picture's: only such ones count in CIDEr."""
    pictures = Counter()
    for captions in truth.values():
        words = [caption.split() for caption in captions]
        pictures.update(
            {tuple(w[i : i + n]) for w in words for n in range(1, 5) for i in range(len(w) - n + 1)}
        )
    return min(pictures.values()) < len(truth)


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


def _refuse_bare(captions: Mapping[str, Sequence[str]]) -> None:
    bare = sorted(key for key, group in captions.items() if not any(map(str.strip, group)))
    if bare:
        raise UserError(f"{len(bare)} pictures have no reference caption with a word, {bare[0]} the first")


def _check_pictures(references: Iterable[str], predictions: Iterable[str]) -> None:
    references, predictions = set(references), set(predictions)
    without, unknown = sorted(references - predictions), sorted(predictions - references)
    problems = [
        *([f"{len(without)} pictures have no prediction, {without[0]} the first"] if without else []),
        *([f"{len(unknown)} predictions have no references, {unknown[0]} the first"] if unknown else []),
        *(["none has both: are they of another split?"] if len(without) == len(references) else []),
    ]
    if problems:
        raise UserError("; ".join(problems))


def _bleu(truth: Tokens, guess: Tokens) -> _Scores:
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(truth, guess, verbose=0)


def _meteor(truth: Tokens, guess: Tokens) -> _Scores:
    total, row = score_meteor(truth, guess)
    return [total], [row]


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
    if not all((folder / name).is_file() for name in SPICE_PARSER):
        raise RuntimeError("its parser is not installed; docs/evaluation.md tells how")
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
