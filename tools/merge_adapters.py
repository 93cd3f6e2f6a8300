"""Exports a run as a Hugging Face model that others load without the trainer.

    python tools/merge_adapters.py --checkpoint RUN_DIR --output MODEL_DIR

The same as ``python -m dehvf_ds.export``, which an installed package has without a clone.
"""

import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, from where the package is not seen.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.distributed import run_entry
from dehvf_ds.export.__main__ import main

if __name__ == "__main__":
    run_entry(main)
