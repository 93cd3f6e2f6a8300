"""Draws the demo's world of shapes, in the layouts of COCO and ScienceQA.

    python tools/make_scenes.py --output scenes

The same as ``python -m dehvf_ds.demo.make_scenes``, which an installed package has without a clone.
"""

import runpy
import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, where the package is not found.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    runpy.run_module("dehvf_ds.demo.make_scenes", run_name="__main__")
