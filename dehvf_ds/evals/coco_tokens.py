"""Captions as tokens: the official PTB tokenizer of `pycocoevalcap`, and one without Java."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from dehvf_ds.config import UserError

Captions = Mapping[str, Sequence[str]]
"""Captions of each picture, as they were written."""

Tokens = dict[str, list[str]]
"""Captions of each picture, tokens set apart by one space."""

NO_JAVA = "no `java` is on the PATH; install one (Debian and Ubuntu: apt-get install default-jre-headless)"

# All at which the Java tokenizer ends a line: one of them inside a caption shifts all later captions.
LINE_ENDS = re.compile("[\n\v\f\r\u2028\u2029]")
# The characters of the official list of punctuation, and those that PTB rewrites into entries of it.
PUNCTUATION = "'`\".?!,:;-()[]{}"
MAX_SHOWN = 240
# METEOR writes and reads numbers by the machine's language, where "0,31" is none; texts travel as UTF-8.
_FIXED_LOCALE = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
)


JAVA_MINUTES = 30.0
JAVA_MINUTES_OF_A_TEXT = 0.002
"""How long a scorer may take, and for each text more; COCO's 5,000 pictures take METEOR one or two."""


@contextmanager
def bounded_java(num_texts: int) -> Iterator[None]:
    """Kills the Java that was started inside once its time is over: other ranks may wait for it.

    Raises:
        RuntimeError: it was.
    """
    is_over = threading.Event()

    def kill() -> None:
        is_over.set()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.name() == "java":
                    child.kill()

    minutes = JAVA_MINUTES + JAVA_MINUTES_OF_A_TEXT * num_texts
    timer = threading.Timer(60 * minutes, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if is_over.is_set():
            raise RuntimeError(f"Java was not done after {minutes:.3g} minutes") from error
        raise
    finally:
        timer.cancel()


def require_java() -> None:
    """Refuses PTB tokenization where it cannot run.

    Raises:
        UserError: there is no Java runtime.
    """
    if shutil.which("java") is None:
        raise UserError(
            f"PTB tokenization needs a Java runtime and {NO_JAVA}, or take the simple tokenizer, whose "
            "scores compare with no published ones"
        )


def java_command(*arguments: str) -> list[str]:
    """A call of Java that reads and writes the same on every machine."""
    return ["java", *_FIXED_LOCALE, *arguments]


def java_environment() -> dict[str, str]:
    """This process's environment, without what would overrule ``java_command``."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    # Read after the command line, so it would win.
    if overruling := environment.get("_JAVA_OPTIONS"):
        environment["_JAVA_OPTIONS"] = " ".join([overruling, *_FIXED_LOCALE])
    return environment


def ptb_tokens(captions: Captions) -> Tokens:
    """Tokenizes by the official tokenizer, in Java: lower case, punctuation left out.

    Only its jar and its list of punctuation are used. The package's Python around them writes into
    site-packages, asks for no exit status, and drops or shifts captions when lines do not match.

    Raises:
        UserError: no Java runtime, or Java failed.
    """
    require_java()
    from pycocoevalcap.tokenizer import ptbtokenizer as official

    lines = [_one_line(caption) for group in captions.values() for caption in group]
    jar = Path(official.__file__).with_name(official.STANFORD_CORENLP_3_4_1_JAR)
    command = java_command(
        "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"
    )
    text = "\n".join(lines).encode()
    try:
        with bounded_java(len(lines)):
            done = subprocess.run(command, input=text, capture_output=True, env=java_environment())
            done.check_returncode()
    except RuntimeError as error:
        raise UserError(f"PTB tokenization: {error}") from None
    except subprocess.CalledProcessError as error:
        told = java_error(error.stderr) or f"exit {error.returncode}"
        raise UserError(f"PTB tokenization failed: {told}") from None
    found = done.stdout.decode().split("\n")
    if len(found) != len(lines):
        raise UserError(f"PTB tokenization gave {len(found)} lines for {len(lines)} captions")
    dropped = set(official.PUNCTUATIONS)
    rest = (" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in found)
    return {key: [next(rest) for _ in group] for key, group in captions.items()}


def simple_tokens(captions: Captions) -> Tokens:
    """Tokenizes without Java: lower case, split at white space, punctuation stripped from the ends of words.

    Unlike PTB it does not part ``dog's``, so scores compare with no published ones.
    """

    def tokens(caption: str) -> str:
        words = (word.strip(PUNCTUATION) for word in _one_line(caption).lower().split())
        return " ".join(word for word in words if word)

    return {key: [tokens(caption) for caption in group] for key, group in captions.items()}


def java_error(stderr: bytes) -> str:
    """What Java said of its end, in one line; empty if nothing."""
    lines = (line.strip() for line in stderr.decode(errors="replace").splitlines())
    told = [line for line in lines if line and not line.startswith(("at ", "Picked up "))]
    return " ".join(told[:2])[:MAX_SHOWN]


def _one_line(caption: str) -> str:
    # JSON may hold half a surrogate pair, which has no bytes.
    return LINE_ENDS.sub(" ", caption).encode(errors="replace").decode()
