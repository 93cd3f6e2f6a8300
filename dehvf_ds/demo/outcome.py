"""Says whether the demo came out as it is promised to: it saw, and what was merged captions as the run does.

    python -m dehvf_ds.demo.outcome

Reads what ``make demo`` left in ``runs`` and has both models caption test pictures. Exit code 1 where
something is not as promised.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from dehvf_ds.config import UserError
from dehvf_ds.demo.scenes.world import COLORS, SHAPES, TEXTURES
from dehvf_ds.demo.show import RUN, RUN_BLIND, TEST_SCORES

WORDS = {"color": set(COLORS), "texture": set(TEXTURES) - {"plain"}, "shape": set(SHAPES)}
"""The words of captions that only the picture tells; of a plain thing no texture is said."""

LEAST_CIDER = 100.0
LEAST_RATIO = 3.0
"""CIDEr of the model that sees over that of the one that does not."""

NUM_PICTURES = 12
PICTURES = Path("demo_data/scenes/images/test")


def main() -> int:
    """Looks at the demo of this directory; returns the exit code."""
    try:
        scores = [read_cider(run) for run in (RUN, RUN_BLIND)]
        pictures = sorted(PICTURES.glob("*.png"))[:NUM_PICTURES]
        words = score_words(read_captions(RUN))
        captions = [caption(model, pictures) for model in (RUN, RUN / "merged")]
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"error: {error}; run `make demo` first", file=sys.stderr)
        return 2
    print(f"CIDEr {scores[0]:.1f}, of the model that cannot see {scores[1]:.1f}; {len(captions[0])} captions")
    print("F1 of words: " + ", ".join(f"{kind} {f1:.3f}" for kind, f1 in words.items()))
    broken = [*judge_scores(*scores), *judge_captions(*captions)]
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(broken))


def read_cider(run: Path) -> float:
    """The score of a run's captions of the test scenes, x100."""
    return float(json.loads((run / TEST_SCORES).read_text(encoding="utf-8"))["CIDEr"])


def read_captions(run: Path) -> Iterable[tuple[str, str]]:
    """A run's captions of the test scenes, each with the first of its scene's own."""
    path = (run / TEST_SCORES).with_name("predictions.jsonl")
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        yield line["prediction"], line["references"][0]


def score_words(captions: Iterable[tuple[str, str]]) -> dict[str, float]:
    """F1, 0 to 1, of the words of each kind, over pairs of what was said and what is true."""
    right, counted = Counter[str](), Counter[str]()
    for said, true in captions:
        both = [re.findall("[a-z]+", text.lower()) for text in (said, true)]
        for kind, words in WORDS.items():
            ours, theirs = (Counter(w for w in spoken if w in words) for spoken in both)
            right[kind] += (ours & theirs).total()
            counted[kind] += ours.total() + theirs.total()
    return {kind: 2 * right[kind] / max(1, counted[kind]) for kind in WORDS}


def judge_scores(cider: float, blind: float) -> Iterable[str]:
    """What is wrong with the scores."""
    # Written so that NaN is wrong, too.
    if not cider >= LEAST_CIDER:
        yield f"CIDEr {cider:.1f} on unseen scenes; at least {LEAST_CIDER:g} is promised"
    if not cider >= LEAST_RATIO * blind:
        yield f"CIDEr {cider:.1f} is not {LEAST_RATIO:g} times the {blind:.1f} of the model that cannot see"


def judge_captions(run: Mapping[str, str], merged: Mapping[str, str]) -> Iterable[str]:
    """What is wrong with the merged model's captions, by picture."""
    if len(run) < 8 or run.keys() != merged.keys():
        yield f"captions of {len(run)} and {len(merged)} pictures; 8 of the same are needed"
    for picture, text in run.items():
        if merged.get(picture) != text:
            yield f"{picture}: the run says {text!r}, the merged model {merged.get(picture)!r}"


def caption(model: Path, pictures: Iterable[Path]) -> dict[str, str]:
    """A model's captions, by picture, from the program that a user would start.

    In fp32: two bf16 computations of one model part where two words are about as likely.

    Raises:
        UserError: it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "captions.jsonl"
        command = [sys.executable, "-m", "dehvf_ds.generate", "--model", str(model), "--output", str(output)]
        command += ["--dtype", "fp32"]
        done = subprocess.run(
            [*command, "--image", *map(str, pictures)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise UserError(f"{model}: {done.stderr.strip().splitlines()[-1]}")
        lines = map(json.loads, output.read_text(encoding="utf-8").splitlines())
        return {line["image"]: line["text"] for line in lines}


if __name__ == "__main__":
    sys.exit(main())
