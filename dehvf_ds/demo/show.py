"""What ``make demo`` prints at its end."""

from dehvf_ds.demo.outcome import show
from dehvf_ds.distributed import run_entry

if __name__ == "__main__":
    run_entry(show)
