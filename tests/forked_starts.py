"""Starts programs as ``python SCRIPT`` and ``python -m MODULE`` would, many for one import of torch.

    python forked_starts.py RESULTS < JOBS

reads a JSON list of jobs (``program``: a script's path, or ``-m`` and a module; ``args``; ``cwd``) and writes
one of their exit codes and outputs. The packages that everything imports are loaded once and each job runs in
a fork, with the search path that Python would give it. Ours is loaded by none but the jobs.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

OWN_FOLDER = sys.path.pop(0)


def run(program: list[str], args: list[str]) -> int:
    """Runs one program in this process; returns the exit code that Python would end with."""
    if program[0] == "-m":
        sys.argv = [program[1], *args]
        sys.path.insert(0, str(Path.cwd()))
    else:
        sys.argv = [program[0], *args]
        script = Path(program[0]).resolve()
        sys.path.insert(0, str(script if script.is_dir() else script.parent))
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in a process of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(job["cwd"])
            code = run(job["program"], job["args"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return job | {"code": code, "stdout": texts[0], "stderr": texts[1]}


def main() -> None:
    """Runs the jobs one after the other."""
    import deepspeed
    import peft
    import transformers

    assert {"deepspeed", "peft", "transformers"} <= {m.__name__ for m in (deepspeed, peft, transformers)}
    assert not [name for name in sys.modules if name.partition(".")[0] == "dehvf_ds"]
    Path(sys.argv[1]).write_text(json.dumps([fork(job) for job in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
