"""Writes one HTML page about one or several runs.

    python tools/report.py RUN_DIR... [--output report.html]

The same as ``python -m dehvf_ds.report``, which an installed package has without a clone.
"""

import runpy
import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, where the package is not found.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    runpy.run_module("dehvf_ds.report", run_name="__main__")
