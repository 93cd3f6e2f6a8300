"""How fast a GPU trains and decodes: one command, a few minutes, no network and no weights.

    python benchmarks/gpu.py --output DIR [--budget-s 450]      # one GPU of 80 GB
    python benchmarks/gpu.py --output DIR --rehearse            # every part at tiny sizes on the CPU

Random weights of LLaMA-7B's and 13B's shapes and of CLIP ViT-L/14's are made on the GPU in bf16. Parts run in
order of their worth, in a few processes; after every part DIR holds all so far: ``results.json``, a table in
``results.md``, and ``profile.txt``. What the budget has no time for is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GROUPS = ("plain", "zero3", "zero2", "decode", "llava", "largest")
"""Of parts, each a process of its own: what breaks one leaves the others alone."""

START_S = 30
"""Below this many seconds no process is started."""

GIB = 2**30
NOTES = """\
Weights are random and in bf16; trainables too (under ZeRO with fp32 masters), optimizer AdamW. Rows are
captions of T random tokens, without padding, with a picture of 224 x 224 each. A step is one micro-batch:
host to device, forward, backward, clipping, AdamW; its median, and the range. `compiled` is with
`train.compile`, its first steps not counted. The 256 visual tokens a row of `prefix` and LLaVA are not
counted. MFU is 4 FLOPs x parameters of the language model x tokens / time / 989 TFLOP/s; HFU is the share
of that peak with all matrix products of the step counted (prefix, attention, tower, branch). `planned` is
the memory of dehvf_ds/plan.py without CUDA's own.
"""


def main() -> int:
    """Runs every group in a process of its own; returns 0 if each came to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--budget-s", type=float, default=450, help="seconds; what does not fit is left out")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--parts", default="", help="a regular expression: only parts whose names it finds")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in one process")
    args = parser.parse_args()
    deadline = time.time() + args.budget_s
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("parts.jsonl", "profile.txt"):
        (args.output / name).unlink(missing_ok=True)
    whole = True
    for groups in [args.groups] if args.rehearse else [[group] for group in args.groups]:
        wrong = {"left out": "no time left"}
        if args.rehearse or deadline - time.time() > START_S:
            code = run_group(groups, args, deadline)
            wrong = {"failed": f"process ended with code {code}"} if code else {}
        if wrong:
            append(args.output, {"part": " ".join(groups), **wrong})
            whole = False
    print((args.output / "results.md").read_text(encoding="utf-8"), flush=True)
    return 0 if whole else 1


def run_group(groups: list[str], args: argparse.Namespace, deadline: float) -> int:
    """Runs groups in one process and kills it at the deadline; returns its exit code."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), *groups]
    command += ["--output", str(args.output), "--deadline", str(deadline), "--parts", args.parts]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if args.rehearse:
        command.append("--rehearse")
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    started = time.time()
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait(timeout=max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    print(f"[{' '.join(groups)}: {time.time() - started:.0f} s, code {code}]", flush=True)
    return code


def append(output: Path, result: dict[str, Any]) -> None:
    """Adds a part's result, and writes all so far anew."""
    with (output / "parts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    lines = (output / "parts.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (output / "results.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: list[dict[str, Any]]) -> str:
    """The tables: steps, largest micro-batches, decoding, the profile, and what is missing."""
    lines = [NOTES]
    lines += [f"{r['device']}, torch {r['torch']}, CUDA {r['cuda']}\n" for r in results[:1] if "device" in r]
    head = "model | rows x T | step ms | tokens/s | MFU | HFU | peak GiB | planned GiB"
    lines += _table(head, [_step_row(r) for r in results if "step_s" in r])
    largest = [
        [r["part"], r["tokens"], r["rows"] or "none", r["failed_rows"] or "-", f"{r['peak_bytes'] / GIB:.1f}"]
        for r in results
        if "failed_rows" in r
    ]
    lines += _table("largest micro-batch | T | rows | next that failed | peak GiB", largest)
    head = "decoding | batch | tokens/s | bare LLM | ratio"
    lines += _table(head, [_decoding_row(r) for r in results if "bare_tokens_per_s" in r])
    for r in results:
        if "kernels" in r:
            wall, busy, waiting = (f"{1e3 * r[name]:.1f} ms" for name in ("wall_s", "busy_s", "waiting_s"))
            lines.append(f"{r['part']}: step {wall}, device busy {busy}, host in synchronisation {waiting}\n")
            lines += _table("where the time goes | share", r["kinds"])
            lines += _table("kernel | ms a step | calls", r["kernels"])
        lines += [f"- {r['part']}: {r[what]}" for what in ("failed", "left out") if what in r]
    return "\n".join(lines) + "\n"


def _step_row(result: dict[str, Any]) -> list[Any]:
    first, last = (1e3 * value for value in result["range_s"])
    return [
        result["part"],
        f"{result['rows']} x {result['tokens']}",
        f"{1e3 * result['step_s']:.1f} ({first:.1f}-{last:.1f})",
        f"{result['tokens_per_s']:.0f}",
        *("-" if result[k] is None else f"{100 * result[k]:.1f} %" for k in ("mfu", "hfu")),
        *(f"{result[k] / GIB:.1f}" if result.get(k) else "-" for k in ("peak_bytes", "planned_bytes")),
    ]


def _decoding_row(result: dict[str, Any]) -> list[Any]:
    speed, bare = result["tokens_per_s"], result["bare_tokens_per_s"]
    return [result["part"], result["batch"], f"{speed:.0f}", f"{bare:.0f}", f"{speed / bare:.2f}"]


def _table(head: str, rows: list[list[Any]]) -> list[str]:
    body = ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    return [f"| {head} |", "|" + " --- |" * (head.count("|") + 1), *body, ""] if rows else []


if __name__ == "__main__":
    sys.exit(main())
