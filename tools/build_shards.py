"""Builds, indexes and verifies shards; its flags are described in ``dehvf_ds/data/building/__main__.py``.

    python tools/build_shards.py coco --annotations captions_train2017.json --images train2017 --output DIR

The same as ``python -m dehvf_ds.data.building``, which an installed package has without a clone.
"""

import sys
from pathlib import Path

# Run as a script, tools/ is first on the path, from where the package is not seen.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.data.building.__main__ import main
from dehvf_ds.distributed import run_entry

if __name__ == "__main__":
    run_entry(main)
