"""A merge that is killed while it writes its second shard. Arguments: those of ``merge_adapters.py``."""

from __future__ import annotations

import os
import signal
import sys

from dehvf_ds.export import cli, shards

write = shards._write_shard


def write_one(path, pieces):
    if path.name.startswith("model-00002"):
        with path.open("wb") as file:
            file.write(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, pieces)


if __name__ == "__main__":
    shards._write_shard = write_one
    cli.main(sys.argv[1:])
