"""Prints what the demo learned, where everything lies, and what to try next."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

RUN, RUN_BLIND = Path("runs/demo"), Path("runs/demo-none")
TEST_SCORES = Path("eval/coco-test/metrics.json")


def main() -> int:
    """Reads the two demo runs; returns the exit code."""
    try:
        for name, run in {"DEHVF": RUN, "text only (fusion: none)": RUN_BLIND}.items():
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [json.loads(line)["train/loss"] for line in lines]
            scores = json.loads((run / TEST_SCORES).read_text(encoding="utf-8"))
            print(
                f"{name:26} loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps,"
                f"  unseen scenes: CIDEr {scores['CIDEr']:.1f}  BLEU-4 {scores['BLEU-4']:.1f}"
            )
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; run `make demo` first", file=sys.stderr)
        return 2
    activate = os.path.relpath(Path(sys.prefix) / "bin/activate")
    print(
        f"""
captions of 8 unseen scenes   {RUN}/eval/coco-test/examples.png
scores and all captions       {RUN}/eval/coco-test/metrics.json, predictions.jsonl
what was trained              {RUN}/adapter/
the merged model              {RUN}/merged/

next:  source {activate}
       tensorboard --logdir runs
       python dehvf_ds/generate.py --model runs/demo/merged --image YOUR_PICTURE.jpg
       deepspeed dehvf_ds/train.py --deepspeed ds_configs/zero3.json --config coco_llama13b"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
