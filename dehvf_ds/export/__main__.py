"""``python -m dehvf_ds.export``: see ``cli.py``."""

from dehvf_ds.distributed import run_entry
from dehvf_ds.export.cli import main

if __name__ == "__main__":
    run_entry(main)
