"""Runs the commands whose output stands in RESULTS.md, one after the other, and writes what they print there.

    python benchmarks/results.py [--only decode branch] [--list]

A block of RESULTS.md from `<!-- bench: COMMAND -->` to `<!-- end -->` holds the command and its last output;
the block `<!-- machine -->` says what ran it. A command that fails leaves its block as it was, and the exit
code is 1. Let nothing else run beside it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
from bench import REPOSITORY, flags

RESULTS = Path(__file__).parent / "RESULTS.md"
BLOCK = re.compile(r"(?ms)^<!-- bench: (?P<command>[^\n]*) -->\n.*?^<!-- end -->$")
MACHINE = re.compile(r"(?ms)^<!-- machine -->\n.*?^<!-- end -->$")
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def main() -> int:
    """Parses the flags, runs the commands, rewrites the file after each."""
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="words, one of which a command has to contain")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    commands = [block["command"] for block in BLOCK.finditer(RESULTS.read_text())]
    chosen = [c for c in commands if not args.only or any(word in c for word in args.only)]
    failed = 0
    for command in chosen:
        print(command, flush=True)
        if args.list:
            continue
        output = run(command)
        if output is None:
            failed = 1
            continue
        text = RESULTS.read_text()
        text = BLOCK.sub(lambda block, c=command, o=output: filled(block, c, o), text)
        RESULTS.write_text(MACHINE.sub(lambda _: f"<!-- machine -->\n{machine()}\n<!-- end -->", text))
    return failed


def run(command: str) -> str | None:
    """What a command prints, run as by a user in this environment; None if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        shlex.split(command),
        cwd=REPOSITORY,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    if found.returncode:
        print(f"error: exit code {found.returncode}; its block stays as it was", file=sys.stderr, flush=True)
        return None
    return found.stdout.strip()


def filled(block: re.Match[str], command: str, output: str) -> str:
    """A block with a command's new output, in Markdown as it is if it holds a table; others stay."""
    if block["command"] != command:
        return block[0]
    body = output if re.search(r"(?m)^\|", output) else f"```text\n{output}\n```"
    return f"<!-- bench: {command} -->\n\n    {command}\n\n{body}\n\n<!-- end -->"


def machine() -> str:
    """The machine and the libraries, in a sentence."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    cpu, memory = (models or [platform.processor()])[0], psutil.virtual_memory().total / 2**30
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    hardware = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    return f"{hardware}; Python {platform.python_version()}, {versions}; commit {commit}."


if __name__ == "__main__":
    sys.exit(main())
