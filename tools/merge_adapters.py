"""Exports a run as a Hugging Face model that others load without the trainer.

    python tools/merge_adapters.py --checkpoint RUN_DIR --output MODEL_DIR

The same as ``python -m dehvf_ds.export``, which an installed package has without a clone.
"""

import runpy
import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, where the package is not found.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    runpy.run_module("dehvf_ds.export", run_name="__main__")
