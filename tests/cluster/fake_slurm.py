"""A job without SLURM: stand-ins of its commands, and a Python that runs what a test gives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from processes import REPOSITORY

FAKES = {
    # Every task at once, each on a node of its own; the largest exit code.
    "srun": """
        while [[ "$1" == --* ]]; do
          case "$1" in
            --help) cat "$FAKE/srun_help"; exit ;;
            --ntasks=*) tasks="${1#*=}" ;;
            --overlap) exit 1 ;;
          esac
          shift
        done
        pids=() code=0
        for ((i = 0; i < tasks; i++)); do
          SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 SLURMD_NODENAME=n$((i + 1)) "$@" &
          pids+=($!)
          echo $! >"$FAKE/pid.$i"
        done
        for pid in "${pids[@]}"; do wait "$pid" || { last=$?; ((last > code)) && code=$last; }; done
        exit "$code"
    """,
    "scontrol": """
        case "$1 $2" in
          "show hostnames") echo n1 n2 ;;
          "show job")
            echo "JobState=RUNNING Restarts=$(<$FAKE/restarts) ExcNodeList=(null) StdOut=$FAKE/log"
            ;;
          requeue*) cat $FAKE/refusal >&2; [ -s $FAKE/refusal ] && exit 1; echo 1 >$FAKE/restarts ;;
        esac
    """,
    "scancel": 'kill -USR2 "$(<"$FAKE/pid.0")" "$(<"$FAKE/pid.1")"',
    "apptainer": 'while [ "$1" != image ]; do shift; done; shift; exec "$@"',
    # What ranks are.
    "python": 'if [ "$2" = dehvf_ds.cluster.node_check ]; then eval "$CHECK"; else eval "$RANK"; fi',
}


class FakeJob:
    """A job of two nodes with a task each."""

    def __init__(self, root: Path) -> None:
        self.root, self.logs, self.run_dir = root, root / "logs", root / "run"
        self._started: list[subprocess.Popen[bytes]] = []
        (root / "bin").mkdir()
        for name, text in FAKES.items():
            (root / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"$FAKE/calls"\n{text}')
            (root / "bin" / name).chmod(0o755)
        (root / "bin/python3").symlink_to(sys.executable)
        (root / "bin/activate").write_text(f"PATH={root}/bin:$PATH\n")
        for name, text in {"restarts": "0", "refusal": "", "srun_help": ""}.items():
            (root / name).write_text(text)

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        """Starts a program as a part of the job; its output is the job's log."""
        paths = {"FAKE": self.root, "LOG_DIR": self.logs, "RUN_DIR": self.run_dir, "DEHVF_VENV": self.root}
        given = {name: str(path) for name, path in paths.items()} | {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "HEALTH_CHECK": "0",
            "LINGER_S": "1",
            "RANK": "exit 0",
        }
        with (self.root / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | given | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, *flags: str, script: str = "slurm/train_coco.sh", **env: str) -> int:
        """Runs a job's script; returns its exit code."""
        return self.start("bash", script, *flags, **env).wait(timeout=60)

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def calls(self, program: str, word: str = "") -> list[str]:
        """What was asked of one of the stand-ins; of scontrol, what it was told to do."""
        lines = (self.root / "calls").read_text().splitlines()
        wanted = [line for line in lines if line.startswith(f"{program} ") and word in line]
        return [line for line in wanted if not line.startswith("scontrol show")]

    def stop(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
