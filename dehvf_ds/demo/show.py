"""Prints what the demo learned, where everything lies, and what to try next."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RUNS = {"DEHVF": Path("runs/demo"), "text only (fusion: none)": Path("runs/demo-none")}


def main() -> int:
    """Reads the two demo runs; returns the exit code."""
    try:
        for name, run in RUNS.items():
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [json.loads(line)["train/loss"] for line in lines]
            scores = json.loads((run / "eval/coco-test/metrics.json").read_text(encoding="utf-8"))
            print(
                f"{name:26} loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps,"
                f"  unseen scenes: CIDEr {scores['CIDEr']:.1f}  BLEU-4 {scores['BLEU-4']:.1f}"
            )
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; run `make demo` first", file=sys.stderr)
        return 2
    print(
        f"""
captions of 8 unseen scenes   {RUNS["DEHVF"]}/eval/coco-test/examples.png
scores and all captions       {RUNS["DEHVF"]}/eval/coco-test/metrics.json, predictions.jsonl
what was trained              {RUNS["DEHVF"]}/adapter/
the merged model              {RUNS["DEHVF"]}/merged/

next:  .venv/bin/tensorboard --logdir runs
       .venv/bin/python dehvf_ds/generate.py --model runs/demo/merged --image YOUR_PICTURE.jpg
       .venv/bin/deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json --config coco_llama13b"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
