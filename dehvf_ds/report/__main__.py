"""Writes one HTML page about one or several runs, side by side; it needs no network and no scripts.

python -m dehvf_ds.report RUN_DIR... [--output report.html]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dehvf_ds.config import UserError, expand_flags
from dehvf_ds.distributed import run_entry
from dehvf_ds.report.runs import load_runs


def main(argv: list[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes one HTML page about runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="what train.py wrote")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    args = expand_flags(parser.parse_args(argv))
    # Here, since matplotlib takes long to import, and only the page needs it.
    from dehvf_ds.report.page import build_page

    page = build_page(load_runs(args.runs))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        # A damaged caption may hold half a surrogate pair, which UTF-8 cannot.
        args.output.write_bytes(page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from None
    print(f"report: {args.output}")
    return 0


if __name__ == "__main__":
    run_entry(main)
