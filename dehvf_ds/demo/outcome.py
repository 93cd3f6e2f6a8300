"""Checks the outcome of the demo: the model sees, and its export gives the same captions.

    python -m dehvf_ds.demo.outcome

Reads what ``make demo`` left in ``runs``, and has both the run and its export caption test pictures. Exit
code 1 if anything is wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dehvf_ds.config import UserError
from dehvf_ds.demo.scenes import COLORS, SHAPES, TEXTURES
from dehvf_ds.distributed import run_entry

RUN, RUN_BLIND = Path("runs/demo"), Path("runs/demo-none")
EVALUATION = Path("eval/caption-test")
PICTURES = Path("demo_data/scenes/images/test")
NUM_PICTURES = 12

WORDS = {"color": set(COLORS), "texture": set(TEXTURES) - {"plain"}, "shape": set(SHAPES)}
"""The words of captions that only the picture determines; a plain texture is not mentioned."""

LEAST_CIDER = 100.0
LEAST_RATIO = 3.0
"""CIDEr of the model that sees over that of the blind one."""


def main(argv: list[str] | None = None) -> int:
    """Checks the demo in this directory; returns the exit code."""
    cider, blind = (read_scores(run)["CIDEr"] for run in (RUN, RUN_BLIND))
    answers = read_lines(RUN / EVALUATION / "predictions.jsonl")
    words = score_words((answer["prediction"], answer["references"][0]) for answer in answers)
    pictures = sorted(PICTURES.glob("*.png"))[:NUM_PICTURES]
    captions, merged = (caption(model, pictures) for model in (RUN, RUN / "merged"))
    print(f"CIDEr {cider:.1f}, of the blind model {blind:.1f}; {len(captions)} captions")
    print("F1 of words: " + ", ".join(f"{kind} {f1:.3f}" for kind, f1 in words.items()))
    broken = list(judge(cider, blind, captions, merged))
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(broken))


def show(argv: list[str] | None = None) -> None:
    """Prints what the demo learned, where the results are, and what to try next."""
    for name, run in {"DEHVF": RUN, "text only (fusion: none)": RUN_BLIND}.items():
        losses = [line["train/loss"] for line in read_lines(run / "metrics.jsonl")]
        scores = read_scores(run)
        print(
            f"{name:26} loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps,"
            f"  unseen scenes: CIDEr {scores['CIDEr']:.1f}  BLEU-4 {scores['BLEU-4']:.1f}"
        )
    print(
        f"""
captions of 8 unseen scenes   {RUN / EVALUATION}/examples.png
scores and all captions       {RUN / EVALUATION}/metrics.json, predictions.jsonl
what was trained              {RUN}/adapter/
the merged model              {RUN}/merged/

next:  source {os.path.relpath(Path(sys.prefix) / "bin/activate")}
       tensorboard --logdir runs
       python dehvf_ds/generate.py --model runs/demo/merged --image YOUR_PICTURE.jpg
       deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json --config coco_llama13b"""
    )


def read_scores(run: Path) -> dict[str, float]:
    """The scores of a run's captions of the test scenes, x100."""
    return json.loads(_read(run / EVALUATION / "metrics.json"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in _read(path).splitlines()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error}; run `make demo` first") from error


def score_words(captions: Iterable[tuple[str, str]]) -> dict[str, float]:
    """F1, 0 to 1, of the words of each kind, over pairs of prediction and reference."""
    right, counted = Counter[str](), Counter[str]()
    for pair in captions:
        for kind, words in WORDS.items():
            said, true = (Counter(w for w in re.findall("[a-z]+", t.lower()) if w in words) for t in pair)
            right[kind] += (said & true).total()
            counted[kind] += said.total() + true.total()
    return {kind: 2 * right[kind] / max(1, counted[kind]) for kind in WORDS}


def judge(cider: float, blind: float, run: Mapping[str, str], merged: Mapping[str, str]) -> Iterable[str]:
    """What is wrong with both models' scores, or with the captions of the run and its export."""
    # NaN is wrong, too.
    if not cider >= LEAST_CIDER:
        yield f"CIDEr {cider:.1f} on unseen scenes; at least {LEAST_CIDER:g} is expected"
    if not cider >= LEAST_RATIO * blind:
        yield f"CIDEr {cider:.1f} is not {LEAST_RATIO:g} times the {blind:.1f} of the blind model"
    if len(run) < 8 or run.keys() != merged.keys():
        yield f"captions of {len(run)} and {len(merged)} pictures; 8 of the same are needed"
    for picture, text in run.items():
        if merged.get(picture) != text:
            yield f"{picture}: the run says {text!r}, the merged model {merged.get(picture)!r}"


def caption(model: Path, pictures: Iterable[Path]) -> dict[str, str]:
    """A model's captions by picture, from ``generate.py``.

    In fp32, since two bf16 computations differ where two words are about equally likely.
    """
    command = [sys.executable, "-m", "dehvf_ds.generate", "--model", str(model), "--output", "-"]
    command += ["--dtype", "fp32", "--image", *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{model}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    lines = map(json.loads, done.stdout.splitlines())
    return {line["image"]: line["text"] for line in lines}


if __name__ == "__main__":
    run_entry(main)
