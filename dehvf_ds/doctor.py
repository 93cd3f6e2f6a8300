"""Looks at what a run needs and names the remedy of what is missing.

    python -m dehvf_ds.doctor [--config RECIPE|FILE]

Exit code 0 where nothing FAILs, 1 otherwise, 2 for wrong flags. Needs the standard library alone, so that a
broken environment gets its report too: everything else is imported by the check that looks at it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from dehvf_ds.config import RunConfig

DISTRIBUTION = "dehvf_ds"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
MIN_PYTHON = (3, 11)
SHARED_MEMORY = Path("/dev/shm")
GIB = 1 << 30
MIB = 1 << 20
IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        level: ``ok``; ``warn`` where some runs suffer; ``FAIL`` where a run cannot work.
        what: what was looked at.
        found: what is there.
        remedy: what to do; empty where all is well.
    """

    level: Literal["ok", "warn", "FAIL"]
    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A function that looks at one thing, and that thing's name for the case that the function fails."""

    what: str
    look: Callable[[], Line | list[Line]]


def main(argv: list[str]) -> int:
    """Prints the report, a line as soon as it is known; returns the exit code."""
    parser = _Parser(
        prog="doctor.py", description="Looks at what a run needs and names remedies.", allow_abbrev=False
    )
    parser.add_argument("--config", help="a recipe's name or a YAML file: also look at what that run needs")
    recipe = parser.parse_args(argv).config
    failed = False
    # Chained, not listed: which checks follow a recipe is known once it has been read.
    for check in chain(environment_checks(), recipe_checks(recipe) if recipe is not None else ()):
        for line in run_check(check):
            failed |= line.level == "FAIL"
            print(format_line(line), flush=True)
    return int(failed)


def run_check(check: Check) -> list[Line]:
    """The lines of one check; an exception becomes a FAIL line, so that the others are still reported."""
    try:
        lines = check.look()
    # SystemExit too: a package that is broken enough may exit at its import.
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        # UserError is our own one-line message and needs no name before it.
        found = text if type(error).__name__ == "UserError" else f"{type(error).__name__}: {text}"
        remedy = "mend what is found here, then run the doctor again"
        if isinstance(error, ImportError):
            remedy = "install the packages that are FAIL above"
        return [Line("FAIL", check.what, found, remedy)]
    return lines if isinstance(lines, list) else [lines]


def format_line(line: Line) -> str:
    """``level  what  found  remedy``, in columns."""
    return f"{line.level:<4}  {line.what:<18}  {line.found:<44}  {line.remedy}".rstrip()


def environment_checks() -> Iterator[Check]:
    """What every run needs of the machine and of the Python environment."""
    yield Check("Python", check_python)
    yield Check("packages", check_packages)
    yield Check("torch build", check_torch)
    yield Check("GPUs", check_gpus)
    yield Check("NCCL", check_nccl)
    yield Check("bf16", check_bf16)
    yield Check("C++ compiler", check_compiler)
    yield Check("ninja", check_ninja)
    yield Check("deepspeed import", check_deepspeed_import)
    yield Check("Java", check_java)
    yield Check("shared memory", check_shared_memory)
    yield Check("open files", check_open_files)
    yield Check("temporary files", check_temporary_space)


def recipe_checks(recipe: str) -> Iterator[Check]:
    """What the run of a recipe needs on disk; the recipe alone where it cannot be read."""
    configs: list[RunConfig] = []

    def read() -> Line:
        from dehvf_ds.config import parse_run_config

        configs.append(parse_run_config(["--config", recipe]))
        return Line("ok", "recipe", recipe)

    yield Check("recipe", read)
    if not configs:
        return
    config = configs[0]
    backbones = {"language model": config.model.language_model, "vision tower": config.model.vision_tower}
    for what, source in backbones.items():
        yield Check(what, partial(check_backbone, what, source))
    yield Check("training shards", partial(check_shards, config))
    yield Check("run directory", partial(check_run_dir, config.run_dir))
    yield Check("DeepSpeed JSON", partial(check_deepspeed_json, config))


# Python and its packages


def check_python() -> Line:
    """The interpreter's version."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < MIN_PYTHON:
        return Line("FAIL", "Python", found, f"use Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Line("ok", "Python", found)


def read_requirements() -> list[str]:
    """Our requirements: those of the checkout, or of the installed package where there is none."""
    if PYPROJECT.is_file():
        import tomllib

        return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    given = importlib.metadata.requires(DISTRIBUTION) or []
    return [requirement for requirement in given if "extra ==" not in requirement]


def parse_requirement(requirement: str) -> tuple[str, str]:
    """Name and smallest version of ``name[extras]>=version``, the one form that we use.

    Not by the ``packaging`` library, which may be what is missing.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)", requirement.strip())
    if match is None:
        raise ValueError(f"the requirement {requirement!r} is not of the form name>=version")
    return match[1], match[2]


def version_key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, trailing zeros left out: ``2.6.0+cu124`` is (2, 6)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_packages() -> list[Line]:
    """Every package that pyproject.toml asks for, by what is installed; nothing is imported."""
    lines = []
    for requirement in read_requirements():
        name, minimum = parse_requirement(requirement)
        remedy = f"pip install '{requirement}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line("FAIL", name, f"not installed; needs >= {minimum}", remedy))
            continue
        if version_key(found) < version_key(minimum):
            lines.append(Line("FAIL", name, f"{found}; needs >= {minimum}", remedy))
        else:
            lines.append(Line("ok", name, found))
    return lines


def check_deepspeed_import() -> Line:
    """Whether DeepSpeed imports; in a process of its own, since what it loads may end the process."""
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return Line("FAIL", "deepspeed import", "not installed", "see the line deepspeed above")
    result = subprocess.run(
        [sys.executable, "-c", "import deepspeed"],
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_S,
        check=False,
    )
    if result.returncode == 0:
        return Line("ok", "deepspeed import", "works")
    last = ["", *result.stderr.strip().splitlines()][-1]
    found = last or f"ended with code {result.returncode}"
    return Line("FAIL", "deepspeed import", found, "python -c 'import deepspeed' shows the whole error")


# The device


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver serves; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def computes_on_cpu() -> bool:
    """Whether a run started here computes on the CPU; the rule of ``distributed.read_world``."""
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available()


def check_torch() -> Line:
    """PyTorch's CUDA build against the driver."""
    import torch

    driver = driver_cuda()
    served = "no NVIDIA driver" if driver is None else "driver for CUDA {}.{}".format(*driver)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__}, {build}, {served}"
    if driver is None:
        # A machine without a driver is one of CPU runs, whatever the build.
        return Line("ok", "torch build", found)
    if torch.version.cuda is None:
        remedy = f"install the build of PyTorch for CUDA {driver[0]}: https://pytorch.org/get-started/locally"
        return Line("FAIL", "torch build", found, remedy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return Line("ok", "torch build", found)
    said = "".join(f"; {' '.join(str(warning.message).split())}" for warning in caught[:1])
    remedy = "update the driver, or install PyTorch for the driver's CUDA; see CUDA_VISIBLE_DEVICES too"
    return Line("FAIL", "torch build", f"{found}, but no usable GPU{said}", remedy)


def check_gpus() -> Line:
    """Names and memory of the GPUs."""
    import torch

    if not torch.cuda.is_available():
        return Line("warn", "GPUs", "none", "fine for the demo; the recipes for LLaMA want GPUs")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = Counter(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in properties)
    found = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if computes_on_cpu():
        return Line("warn", "GPUs", f"{found}, not used", "unset DS_ACCELERATOR to compute on them")
    if len(kinds) > 1:
        remedy = "equal ones: all ranks wait for the slowest, and the smallest must hold its share"
        return Line("warn", "GPUs", found, remedy)
    return Line("ok", "GPUs", found)


def check_nccl() -> Line:
    """NCCL, by which GPUs communicate."""
    if computes_on_cpu():
        return Line("ok", "NCCL", "not needed on the CPU")
    from torch.cuda import nccl
    from torch.distributed import is_nccl_available

    if not is_nccl_available():
        return Line("FAIL", "NCCL", "this PyTorch has none", "install one of pytorch.org's Linux builds")
    return Line("ok", "NCCL", ".".join(map(str, nccl.version())))


def check_bf16() -> Line:
    """Whether ``"bf16": {"enabled": "auto"}`` means bf16 here."""
    from dehvf_ds.distributed import has_fast_bf16

    if has_fast_bf16():
        return Line("ok", "bf16", "in hardware")
    found = "not in hardware: runs compute in fp32"
    if computes_on_cpu():
        return Line("ok", "bf16", found)
    return Line("warn", "bf16", found, "NVIDIA GPUs since Ampere have it; fp32 takes twice the memory")


def check_compiler() -> Line:
    """The C++ compiler, for DeepSpeed's shared-memory communication on the CPU.

    On GPUs nothing is compiled: the optimizer is torch's, and no fused operation is used; so neither a
    compiler nor the CUDA toolkit (nvcc) is needed there.
    """
    # As torch.utils.cpp_extension chooses.
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(compiler)
    if path is not None:
        return Line("ok", "C++ compiler", path)
    if not computes_on_cpu():
        return Line("ok", "C++ compiler", "none; not needed on GPUs")
    remedy = "install one (Debian and Ubuntu: apt-get install g++), or name one in CXX"
    return Line("FAIL", "C++ compiler", f"no `{compiler}` on the PATH", remedy)


def check_ninja() -> Line:
    """Ninja, which PyTorch compiles with: the program on the PATH, not the Python package."""
    path = shutil.which("ninja")
    if path is not None:
        return Line("ok", "ninja", path)
    if not computes_on_cpu():
        return Line("ok", "ninja", "none; not needed on GPUs")
    beside = Path(sys.executable).parent / "ninja"
    if beside.is_file():
        return Line("FAIL", "ninja", "not on the PATH", f"activate the environment: {beside.parent} has it")
    return Line("FAIL", "ninja", "not on the PATH", "pip install ninja")


# The machine


def check_java() -> Line:
    """Java, for METEOR and the PTB tokenizer of caption scores; training needs none."""
    path = shutil.which("java")
    if path is None:
        remedy = "caption scores need it (Debian and Ubuntu: apt-get install default-jre-headless)"
        return Line("warn", "Java", "no `java` on the PATH", remedy)
    # A stub that only says where to buy Java is found on the PATH too.
    result = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=False)
    said = (result.stderr or result.stdout).strip().splitlines()
    found = said[0] if said else f"{path} says nothing"
    if result.returncode != 0:
        return Line("warn", "Java", found, "caption scores need one that runs")
    return Line("ok", "Java", found)


def check_shared_memory() -> Line:
    """Space in /dev/shm, through which loader workers hand over their batches."""
    if not SHARED_MEMORY.is_dir():
        remedy = "set data.num_workers to 0 if loading fails"
        return Line("warn", "shared memory", f"no {SHARED_MEMORY}", remedy)
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{SHARED_MEMORY}: {_size(free)} free"
    # 32 pictures of 224 x 224 are 18 MiB in fp32, and every worker of every rank holds two batches ready.
    remedy = "give it more (docker run --shm-size 16g), or lower data.num_workers"
    # Docker's default is 64 MiB; workers then die with "bus error".
    if free < 128 * MIB:
        return Line("FAIL", "shared memory", found, remedy)
    if free < 2 * GIB:
        return Line("warn", "shared memory", found, remedy)
    return Line("ok", "shared memory", found)


def open_files_limit() -> int | None:
    """Files that a process may have open; None means no limit, or one that cannot be known."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def check_open_files() -> Line:
    """The limit of open files: up to 64 shards in each worker, and one for each tensor that it hands over."""
    limit = open_files_limit()
    if limit is None:
        return Line("ok", "open files", "no limit")
    if limit < 1024:
        return Line("FAIL" if limit < 256 else "warn", "open files", str(limit), "ulimit -n 65535")
    return Line("ok", "open files", str(limit))


def check_temporary_space() -> Line:
    """The directory of temporary files: caption scores and compilers write there."""
    # Raises where no directory can be written.
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    found = f"{directory}: {_size(free)} free"
    remedy = "make room, or point TMPDIR at a directory with more"
    if free < 100 * MIB:
        return Line("FAIL", "temporary files", found, remedy)
    if free < GIB:
        return Line("warn", "temporary files", found, remedy)
    return Line("ok", "temporary files", found)


# A recipe's run


def check_backbone(what: str, source: str) -> Line:
    """A backbone's directory, or a hub id's place in the local cache. Asks no server.

    Args:
        what: ``language model`` or ``vision tower``.
        source: directory or hub id.
    """
    remedy = f"give a directory or a hub id as --model.{what.replace(' ', '_')}"
    directory = Path(source)
    if not directory.is_dir():
        # A hub id is `name` or `owner/name`; a path that is not there may look the same.
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is None:
            return Line("FAIL", what, f"{source}: no such directory", remedy)
        return _hub_line(what, source, remedy)
    from dehvf_ds.model.backbones import load_backbone_config

    kind = load_backbone_config(source, vision=what == "vision tower").model_type
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        return Line("FAIL", what, f"{source}: configuration without weights", "copy *.safetensors there too")
    return Line("ok", what, f"{source}: {kind}")


def _hub_line(what: str, source: str, remedy: str) -> Line:
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return Line("ok", what, f"{source}: in the hub's cache")
    if constants.HF_HUB_OFFLINE:
        return Line("FAIL", what, f"{source}: neither here nor in the cache, and offline", remedy)
    found = f"{source}: no directory, and not in the hub's cache"
    return Line("warn", what, found, f"a run will download it if it is a hub id; otherwise {remedy}")


def check_shards(config: RunConfig) -> Line:
    """The training shards: their index, and the size of every file."""
    from dehvf_ds.data.index import ShardIndex

    index = ShardIndex.of_training(config.data)
    index.check_sizes()
    found = f"{config.data.train}: {len(index):,} samples in {len(index.shard_names):,} shards"
    return Line("ok", "training shards", found)


def check_run_dir(run_dir: str) -> Line:
    """Whether the run can write its directory, or make it."""
    path = Path(run_dir).absolute()
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    if not existing.is_dir():
        return Line("FAIL", "run directory", f"{existing} is a file", "name another as --run_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Line("FAIL", "run directory", f"{existing}: not writable", "name another as --run_dir")
    free = shutil.disk_usage(existing).free
    found = f"{run_dir}: {_size(free)} free"
    if free < GIB:
        return Line("warn", "run directory", found, "make room, or name another as --run_dir")
    return Line("ok", "run directory", found)


def check_deepspeed_json(config: RunConfig) -> Line:
    """The DeepSpeed JSON: readable, and at one with the recipe."""
    from dehvf_ds.training.engine import compute_dtype, read_deepspeed_json

    ds_config = read_deepspeed_json(config.deepspeed, config, 1)
    stage = ds_config["zero_optimization"].get("stage", 0)
    dtype = str(compute_dtype(ds_config)).removeprefix("torch.")
    return Line("ok", "DeepSpeed JSON", f"{config.deepspeed}: ZeRO-{stage}, {dtype}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, as the other entries do."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        self.exit(2, f"error: {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
