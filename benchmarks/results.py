"""Runs the commands whose output stands in RESULTS.md and METHOD.md, and writes there what they print.

    python benchmarks/results.py [--only decode branch] [--list]

A block from `<!-- bench: COMMAND -->` to `<!-- end -->` holds the command, its last output and
what ran it. Variables before a command (`OMP_NUM_THREADS=1 torchrun ...`) are set for it. A command that
fails leaves its block as it was, and the exit code is 1. Let nothing else run beside it.
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

PAGES = [Path(__file__).with_name(name) for name in ("RESULTS.md", "METHOD.md")]
BLOCK = re.compile(r"(?ms)^<!-- bench: (?P<command>[^\n]*) -->\n.*?^<!-- end -->$")
VARIABLE = re.compile(r"[A-Za-z_]\w*=")
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def main() -> int:
    """Parses the flags, runs the commands, rewrites the file after each."""
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="words, one of which a command has to contain")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    blocks = [(page, block["command"]) for page in PAGES for block in BLOCK.finditer(page.read_text())]
    chosen = [
        (page, command)
        for page, command in blocks
        if not args.only or any(word in command for word in args.only)
    ]
    if not chosen:
        parser.error(f"no block has a command with {' or '.join(args.only) or 'anything in it'}")
    failed = 0
    for page, command in chosen:
        print(command, flush=True)
        if args.list:
            continue
        output = run(command)
        if output is None:
            failed = 1
            continue
        text = page.read_text()
        page.write_text(BLOCK.sub(lambda block, c=command, o=output: filled(block, c, o), text))
    return failed


def run(command: str) -> str | None:
    """What a command prints, run as by a user in this environment; None if it fails."""
    words = shlex.split(command)
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    while VARIABLE.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    found = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=os.environ | variables,
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
    return f"<!-- bench: {command} -->\n\n    {command}\n\n{body}\n\n*{machine()}*\n\n<!-- end -->"


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
