"""METEOR by the official jar of `pycocoevalcap`, spoken to in its own line protocol."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from dehvf_ds.evals.coco_tokens import NO_JAVA, Tokens, java_command, java_environment, java_error

# Stands between the texts of a line; inside a caption it would make two of it.
_BETWEEN = " ||| "
_BARS = re.compile(r"\|{3,}")


def score_meteor(truth: Tokens, guess: Tokens) -> tuple[float, list[float]]:
    """METEOR over all pictures, and of each in the order of ``truth``, 0 to 1.

    The package's Python around the jar starts it in the machine's language, where a decimal comma makes its
    numbers unreadable, and lets bars in a reference pass for the end of it.

    Args:
        truth: tokenized references of each picture, each with a word.
        guess: one tokenized caption of each picture.

    Raises:
        RuntimeError: no Java runtime, or Java failed; the message is one line.
    """
    if shutil.which("java") is None:
        raise RuntimeError(f"needs a Java runtime and {NO_JAVA}")
    from pycocoevalcap.meteor import meteor as official

    folder = Path(official.__file__).parent
    command = java_command("-Xmx2G", "-jar", official.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
    # A file, not a pipe: what nobody reads from a pipe would in the end stop Java.
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=java_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            statistics = [
                _ask(process, "SCORE", *map(_plain, truth[key]), _plain(guess[key][0])) for key in truth
            ]
            first = _ask(process, "EVAL", *statistics)
            rows = [float(first), *(float(_read(process)) for _ in statistics[1:])]
            return float(_read(process)), rows
        except (OSError, ValueError) as error:
            _end(process)
            stderr.seek(0)
            # What is read from a process that died is no number; its own words tell more.
            raise RuntimeError(java_error(stderr.read()) or f"Java ended: {error}") from error
        finally:
            _end(process)


def _ask(process: subprocess.Popen[bytes], *parts: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{_BETWEEN.join(parts)}\n".encode())
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise ValueError("its answer is cut off")
    return line.decode().strip()


def _plain(text: str) -> str:
    return " ".join(_BARS.sub(" ", text).split())


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    # Closes the pipes, also a standard input that still holds something.
    process.communicate()
