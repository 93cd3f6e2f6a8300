"""Draws the demo's world of shapes, in the layouts of COCO and ScienceQA.

    python tools/make_scenes.py --output scenes

The same as ``python -m dehvf_ds.demo.make_scenes``, which an installed package has without a clone.
"""

import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, from where the package is not seen.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.demo.make_scenes import main
from dehvf_ds.distributed import run_entry

if __name__ == "__main__":
    run_entry(main)
