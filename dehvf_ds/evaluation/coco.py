"""COCO Captions: the official tokenizer and metrics, by `pycocoevalcap`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil

from dehvf_ds.config import UserError, require
from dehvf_ds.evaluation.dataset import match_references
from dehvf_ds.evaluation.predict import Scored

SPICE_PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What SPICE parses with; `pycocoevalcap` comes without and would download it."""

NO_JAVA = "no `java` is on the PATH; install one (Debian and Ubuntu: apt-get install default-jre-headless)"

JAVA_MINUTES = 30.0
JAVA_MINUTES_OF_A_TEXT = 0.002
"""Time limit of a scorer, and what each text adds; METEOR takes a minute or two for COCO's 5,000 pictures."""

PUNCTUATION = "'`\".?!,:;-()[]{}"
"""Characters of the official list of punctuation, or that PTB rewrites into its entries."""

# Java writes and reads numbers in the machine's language ("0,31"), and texts in its encoding.
_JAVA_OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"
# Where the Java tokenizer ends a line: one of these inside a caption would shift all later captions.
_LINE_ENDS = re.compile("[\n\v\f\r\u2028\u2029]")
# Separates the texts of a line for METEOR; inside a caption it would split it.
_BARS = re.compile(r"\|{3,}")
_MAX_REASON_LENGTH = 240

Tokens = dict[str, list[str]]
"""Captions of each picture, tokens set apart by one space."""


class CaptionScorer:
    """Scores one caption per row."""

    def __init__(
        self,
        records: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        tokenizer: Literal["ptb", "simple"] = "ptb",
        references: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Tokenizes the records' own captions, or those of ``references``, by file name; refuses bad ones.

        A reference without a word, such as "...", is left out: to ROUGE-L an empty answer would equal it.
        The scores of the simple tokenizer, which needs no Java, do not compare with published ones.
        """
        self.keys = [key for key, _ in records]
        if references is None:
            self._captions = {key: list(record.get("captions") or ()) for key, record in records}
        else:
            # The shards of other tools hold file names as keys.
            names = {key: str(record.get("file_name") or key) for key, record in records}
            self._captions = match_references(references, names)
        self._tokenizer = tokenizer
        self._tokenize = ptb_tokens if tokenizer == "ptb" else simple_tokens
        tokens = self._tokenize({key: self._captions[key] for key in sorted(self._captions)})
        self._truth: Tokens = {key: [c for c in group if c] for key, group in tokens.items()}
        self._num_wordless = sum(map(len, tokens.values())) - sum(map(len, self._truth.values()))
        if bare := [key for key, group in self._truth.items() if not group]:
            raise UserError(
                f"{len(bare)} pictures have no reference caption with a word, {bare[0]} the first"
            )

    def lines(self, predictions: Sequence[str | int | None]) -> list[dict[str, Any]]:
        """Lines of ``predictions.jsonl``, without scores."""
        return [
            {"key": key, "prediction": _text(prediction), "references": self._captions[key]}
            for key, prediction in zip(self.keys, predictions, strict=True)
        ]

    def score(self, predictions: Sequence[str | int | None]) -> Scored:
        """Scores one caption per row, None for an empty one; a metric that fails does not stop the others."""
        texts = dict(zip(self.keys, map(_text, predictions), strict=True))
        guess = self._tokenize({key: [texts[key]] for key in self._truth})
        corpus, each, missing = _all_metrics(self._truth, guess)
        comparable = self._tokenizer == "ptb"
        summary = ["  ".join(f"{name} {value:.1f}" for name, value in corpus.items())]
        summary += [f"without {name}: {reason}" for name, reason in missing.items()]
        if not comparable:
            summary.append("tokenizer simple: not comparable with published numbers")
        metrics: dict[str, Any] = {
            name: round(corpus[name], 4) if name in corpus else None
            for name in CAPTION_METRICS
            if name in missing or name in corpus
        }
        metrics |= {
            "missing": missing,
            "comparable": comparable,
            "num_empty": sum(not captions[0] for captions in guess.values()),
            "num_wordless_references": self._num_wordless,
            "tokenizer": self._tokenizer,
        }
        scores = [each[key] for key in self.keys]
        return Scored(metrics=metrics, numbers=corpus, scores=scores, summary=summary)


def _text(prediction: str | int | None) -> str:
    return "" if prediction is None else str(prediction)


def _all_metrics(
    truth: Tokens, guess: Tokens
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, str]]:
    """Each metric over the corpus, x100; the same for each picture; in one line why a metric is missing."""
    missing = _undefined(truth, guess)
    corpus: dict[str, float] = {}
    each: dict[str, dict[str, float]] = {key: {} for key in truth}
    for names, compute in METRICS.items():
        if all(name in missing for name in names):
            continue
        try:
            # The package prints its progress to standard output.
            with contextlib.redirect_stdout(io.StringIO()), bounded_java(6 * len(truth)):
                totals, rows = compute(truth, guess)
            if len(names) == 1:
                totals, rows = [totals], [rows]
            scores = [dict(zip(truth, map(float, row), strict=True)) for row in rows]
            if not all(map(math.isfinite, (*totals, *(v for row in scores for v in row.values())))):
                raise ValueError("the score is not a finite number")
        except Exception as error:
            words = " ".join(str(error).split())
            kind = "" if type(error) is RuntimeError and words else f"{type(error).__name__}: "
            missing |= dict.fromkeys(names, f"{kind}{words}"[:_MAX_REASON_LENGTH])
            continue
        for name, total, by_key in zip(names, totals, scores, strict=True):
            if name not in missing:
                corpus[name] = 100 * float(total)
                for key, value in by_key.items():
                    each[key][name] = 100 * value
    require(
        bool(corpus), f"no caption metric could be computed; {'; '.join(dict.fromkeys(missing.values()))}"
    )
    return corpus, each, missing


def _undefined(truth: Tokens, guess: Tokens) -> dict[str, str]:
    """Metrics that are not defined on these captions, although the package returns a number, and why."""
    found = {}
    longest = max(len(captions[0].split()) for captions in guess.values())
    for length in range(longest + 1, 5):
        # The precision of zero sequences, for which the package takes one millionth.
        found[f"BLEU-{length}"] = f"no answer has {'a word' if length == 1 else f'{length} words'}"
    pictures = Counter()
    for captions in truth.values():
        words = [caption.split() for caption in captions]
        pictures.update(
            {tuple(w[i : i + n]) for w in words for n in range(1, 5) for i in range(len(w) - n + 1)}
        )
    # Sequences that every picture has do not count in CIDEr.
    if min(pictures.values()) == len(truth):
        reason = "with one picture" if len(truth) == 1 else "where all pictures have the same references"
        found["CIDEr"] = f"{reason} every word has weight zero; evaluate more pictures"
    return found


def _of_package(module: str, name: str, *arguments: int) -> Callable[[Tokens, Tokens], tuple[Any, Any]]:
    def compute(truth: Tokens, guess: Tokens) -> tuple[Any, Any]:
        scorer = getattr(import_module(f"pycocoevalcap.{module}"), name)
        return scorer(*arguments).compute_score(truth, guess)

    return compute


def _meteor(truth: Tokens, guess: Tokens) -> tuple[Any, Any]:
    from pycocoevalcap.meteor.meteor import Meteor

    _find_java()
    truth, guess = (
        {key: [" ".join(_BARS.sub(" ", text).split()) for text in group] for key, group in texts.items()}
        for texts in (truth, guess)
    )
    scorer, failure, said = Meteor(), None, []
    java: Any = scorer.meteor_p
    # Java would block on a full pipe.
    reader = threading.Thread(target=lambda: said.extend(java.stderr), daemon=True)
    reader.start()
    try:
        return scorer.compute_score(truth, guess)
    except (OSError, ValueError) as error:
        failure = error
    finally:
        java.kill()
        java.wait()
        reader.join()
        for pipe in (java.stdin, java.stdout, java.stderr):
            # Standard input may not be flushed.
            with contextlib.suppress(OSError):
                pipe.close()
        # A failure leaves it locked, and the scorer's destructor would wait for it for ever.
        scorer.lock = threading.Lock()
    # What was read from a dead process is not a number; its own message says more.
    raise RuntimeError(_java_error(b"".join(said)) or f"Java ended: {failure}") from failure


def _spice(truth: Tokens, guess: Tokens) -> tuple[Any, Any]:
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent / "lib"
    if not all((folder / name).is_file() for name in SPICE_PARSER):
        raise RuntimeError("its parser is not installed; docs/evaluation.md says how")
    _find_java()
    total, rows = spice.Spice().compute_score(truth, guess)
    return total, [row["All"]["f"] for row in rows]


METRICS: dict[tuple[str, ...], Callable[[Tokens, Tokens], tuple[Any, Any]]] = {
    ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"): _of_package("bleu.bleu", "Bleu", 4),
    ("METEOR",): _meteor,
    ("ROUGE-L",): _of_package("rouge.rouge", "Rouge"),
    ("CIDEr",): _of_package("cider.cider", "Cider"),
    ("SPICE",): _spice,
}
"""What computes metrics: scores over the corpus and of each picture in order; for several names, of each."""

CAPTION_METRICS = tuple(name for names in METRICS for name in names)


def ptb_tokens(captions: Mapping[str, Sequence[str]]) -> Tokens:
    """Tokenizes with the official tokenizer, in Java: lower case, without punctuation.

    The package's class around its jar is not used: it writes into site-packages, ignores the exit status, and
    drops or shifts captions when lines do not match.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as official

    require_java()
    lines = [_one_line(caption) for group in captions.values() for caption in group]
    jar = Path(official.__file__).with_name(official.STANFORD_CORENLP_3_4_1_JAR)
    tokenizer = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    try:
        with bounded_java(len(lines)):
            done = subprocess.run(
                ["java", "-cp", str(jar), *tokenizer],
                input="\n".join(lines).encode(),
                capture_output=True,
                check=True,
            )
    except RuntimeError as error:
        raise UserError(f"PTB tokenization: {error}") from None
    except subprocess.CalledProcessError as error:
        reason = _java_error(error.stderr) or f"exit {error.returncode}"
        raise UserError(f"PTB tokenization failed: {reason}") from None
    found = done.stdout.decode().split("\n")
    counted = f"PTB tokenization gave {len(found)} lines for {len(lines)} captions"
    require(len(found) == len(lines), counted)
    dropped = set(official.PUNCTUATIONS)
    rest = (" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in found)
    return {key: [next(rest) for _ in group] for key, group in captions.items()}


def simple_tokens(captions: Mapping[str, Sequence[str]]) -> Tokens:
    """Tokenizes without Java; unlike PTB it does not split ``dog's``."""

    def tokens(caption: str) -> str:
        words = (word.strip(PUNCTUATION) for word in _one_line(caption).lower().split())
        return " ".join(word for word in words if word)

    return {key: [tokens(caption) for caption in group] for key, group in captions.items()}


def _one_line(caption: str) -> str:
    # JSON may hold a lone surrogate, which has no bytes.
    return _LINE_ENDS.sub(" ", caption).encode(errors="replace").decode()


def require_java() -> None:
    """Refuses PTB tokenization where it cannot run."""
    remedy = f"{NO_JAVA}, or use the simple tokenizer, whose scores do not compare with published ones"
    require(shutil.which("java") is not None, f"PTB tokenization needs Java: {remedy}")


def _find_java() -> None:
    if shutil.which("java") is None:
        raise RuntimeError(f"needs Java: {NO_JAVA}")


@contextlib.contextmanager
def bounded_java(num_texts: int) -> Iterator[None]:
    """Makes Java that is started inside use English and UTF-8, and kills it at the time limit."""
    minutes = JAVA_MINUTES + JAVA_MINUTES_OF_A_TEXT * num_texts
    is_over = threading.Event()

    def kill() -> None:
        is_over.set()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name() == "java":
                    child.kill()

    timer = threading.Timer(60 * minutes, kill)
    timer.daemon = True
    before = dict(os.environ)
    # Java reads the second after the command line.
    for name in ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"):
        os.environ[name] = f"{before.get(name, '')} {_JAVA_OPTIONS}".strip()
    os.environ["LC_ALL"] = "C.UTF-8"
    timer.start()
    try:
        yield
    except Exception as error:
        if is_over.is_set():
            raise RuntimeError(f"Java was not done after {minutes:.3g} minutes") from error
        raise
    finally:
        timer.cancel()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _java_error(stderr: bytes) -> str:
    """Java's own message in one line; empty if there is none."""
    lines = (line.strip() for line in stderr.decode(errors="replace").splitlines())
    reasons = [line for line in lines if line and not line.startswith(("at ", "Picked up "))]
    return " ".join(reasons[:2])[:_MAX_REASON_LENGTH]
