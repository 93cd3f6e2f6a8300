"""Starts ranks of a script the way launchers do, without one: processes and what a launcher tells them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# The suite is of the CPU, in this process and in those that it starts. Where there is no GPU nothing is set.
if Path("/dev/nvidiactl").exists():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

_SETTINGS = ("PYTHONPATH", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
USER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
"""What programs are started with: the user's own variables, none that a helper or a library would set."""


def start_ranks(script: Path | str, args: list[str], num_ranks: int) -> list[subprocess.Popen[str]]:
    """Starts ``num_ranks`` processes of one job."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        env = USER_ENVIRONMENT | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *args],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def run_ranks(script: Path | str, args: list[str], num_ranks: int, timeout_s: int = 240) -> list[str]:
    """Runs ``num_ranks`` processes to their end and returns their outputs; all must succeed."""
    processes = start_ranks(script, args, num_ranks)
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    return outputs
