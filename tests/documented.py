"""The commands that README and docs tell people to type, as lists of words."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

PAGES = ("README.md", "docs/*.md", "slurm/README.md", "ds_configs/README.md")
PROGRAMS = ("dehvf_ds/*.py", "dehvf_ds/*/cli.py", "dehvf_ds/*/*/cli.py", "dehvf_ds/cluster/*.py")
PROGRAMS += ("dehvf_ds/demo/*.py", "tools/*.py")

STARTERS = ("python", "deepspeed", "torchrun", "srun", "sbatch", "bash", "make", "pip")
"""What a command begins with; one that begins with a script is no command that a shell finds."""

OTHERS = ("git", "source", "tail", "scontrol", "scancel")
"""Commands beside them that are not ours to check."""

_SCRIPT = re.compile(r"[\w/.-]+\.(py|sh)")


@dataclass(frozen=True)
class Command:
    """One command, and the file that it stands in."""

    file: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.words)}"


def documented() -> list[Command]:
    """Every command of the pages, the programs' docstrings and the job scripts' comments, each once.

    Raises:
        ValueError: a line of a block of commands begins with something that is not known here.
    """
    found: list[Command] = []
    for pattern in PAGES:
        for path in sorted(REPOSITORY.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            name = str(path.relative_to(REPOSITORY))
            found += [Command(name, words) for words in (*_blocks(name, text), *_spans(text))]
    for pattern in PROGRAMS:
        for path in sorted(REPOSITORY.glob(pattern)):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = str(path.relative_to(REPOSITORY))
            found += [Command(name, words) for words in (*_lines(text), *_spans(text.replace("``", "`")))]
    for path in sorted((REPOSITORY / "slurm").glob("*.sh")):
        comments = "\n".join(re.findall(r"(?m)^#(     .*)$", path.read_text(encoding="utf-8")))
        found += [Command(f"slurm/{path.name}", words) for words in _lines(comments)]
    return list(dict.fromkeys(found))


def is_command(words: list[str]) -> bool:
    """Whether it starts something of ours; a script without its folder only with flags."""
    words = _after_settings(words)
    if not words or words[0] in STARTERS:
        return bool(words)
    bare = "/" not in words[0]
    return _SCRIPT.fullmatch(words[0]) is not None and (not bare or any(w.startswith("--") for w in words))


def _blocks(name: str, text: str) -> Iterator[tuple[str, ...]]:
    """Commands of the blocks of a page: where one line starts something of ours, every line must be known."""
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text + "\n", flags=re.MULTILINE):
        lines = [line for line in _joined(block) if line]
        split = [_split(line) for line in lines]
        if not any(words and is_command(words) for words in split):
            continue
        for line, words in zip(lines, split, strict=True):
            if not words:
                continue
            if not is_command(words) and _after_settings(words)[0] not in OTHERS:
                raise ValueError(f"{name}: what starts here? add it to the checks: {line}")
            yield from _parts(words)


def _lines(text: str) -> Iterator[tuple[str, ...]]:
    """Commands that stand on lines of their own."""
    for line in _joined(text):
        words = _split(line)
        if words and words[0] in STARTERS and len(words) > 1 and not line.endswith((".", ":", ",")):
            yield from _parts(words)


def _spans(text: str) -> Iterator[tuple[str, ...]]:
    """Commands between backticks, which may go on in the next line."""
    for span in re.findall(r"`([^`]+)`", text):
        words = _split(" ".join(span.split()))
        if words and len(words) > 1 and is_command(words):
            yield from _parts(words)


def _parts(words: list[str]) -> Iterator[tuple[str, ...]]:
    """The commands of ours in a line that joins several by ``&&``, without settings of variables before."""
    part: list[str] = []
    for word in [*words, "&&"]:
        if word not in ("&&", "|", ";"):
            part.append(word)
            continue
        if is_command(part):
            yield tuple(_after_settings(part))
        part = []


def _joined(text: str) -> list[str]:
    return [" ".join(line.split()) for line in re.sub(r"\\\n\s*", " ", text).splitlines()]


def _split(line: str) -> list[str]:
    """Words of a line as a shell splits it, comments and redirections left out."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        # Prose with an apostrophe, or a command that no shell takes.
        words = line.split()
    return words[: words.index(">")] if ">" in words else words


def _after_settings(words: list[str]) -> list[str]:
    first = next((i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word)), len(words))
    return words[first:]
