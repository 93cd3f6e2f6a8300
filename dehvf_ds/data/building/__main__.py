"""``python -m dehvf_ds.data.building``: see ``cli.py``."""

from dehvf_ds.data.building.cli import main
from dehvf_ds.distributed import run_entry

if __name__ == "__main__":
    run_entry(main)
