"""Writes one HTML page about one or several runs.

    python tools/report.py RUN_DIR... [--output report.html]

The same as ``python -m dehvf_ds.report``, which an installed package has without a clone.
"""

import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, from where the package is not seen.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.distributed import run_entry
from dehvf_ds.report.__main__ import main

if __name__ == "__main__":
    run_entry(main)
