"""COCO Captions: the official tokenizer and metrics, by `pycocoevalcap`."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping, Sequence

from dehvf_ds.config import UserError


def score_captions(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Scores captions after PTB tokenization.

    Args:
        references: human captions of each picture.
        predictions: one caption of each picture.

    Returns:
        ``BLEU-1`` .. ``BLEU-4``, ``METEOR``, ``ROUGE-L`` and ``CIDEr``, all x100, over the corpus; and
        each picture's own ``CIDEr``, ``METEOR`` and ``ROUGE-L`` by its key.

    Raises:
        UserError: no Java runtime, pictures that differ between the two, or one without references.
    """
    if set(references) != set(predictions):
        differing = sorted(set(references) ^ set(predictions))
        raise UserError(
            f"predictions and references differ in {len(differing)} pictures, {differing[0]} the first"
        )
    if not references:
        raise UserError("no picture to score")
    bare = sorted(key for key, captions in references.items() if not captions)
    if bare:
        raise UserError(f"{len(bare)} pictures have no reference caption, {bare[0]} the first")
    if shutil.which("java") is None:
        raise UserError(
            "caption scores need a Java runtime (PTB tokenization, METEOR) and no `java` is on the PATH; "
            "install one (Debian and Ubuntu: apt-get install default-jre-headless)"
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    keys = sorted(references)
    tokenizer = PTBTokenizer()
    # The package prints its progress to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tokenizer.tokenize({key: [{"caption": text} for text in references[key]] for key in keys})
        guess = tokenizer.tokenize({key: [{"caption": predictions[key]}] for key in keys})
        bleu, _ = Bleu(4).compute_score(truth, guess)
        meteor, meteors = Meteor().compute_score(truth, guess)
        rouge, rouges = Rouge().compute_score(truth, guess)
        cider, ciders = Cider().compute_score(truth, guess)
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    scores |= {"METEOR": meteor, "ROUGE-L": rouge, "CIDEr": cider}
    # Both tokenized dictionaries keep the order of `keys`, which is that of each picture's scores.
    each = {
        key: {"CIDEr": 100 * float(c), "METEOR": 100 * float(m), "ROUGE-L": 100 * float(r)}
        for key, c, m, r in zip(truth, ciders, meteors, rouges, strict=True)
    }
    return {name: 100 * float(value) for name, value in scores.items()}, each
