"""Checks of a machine before a run: packages, GPUs, memory, disks, and the files of a recipe.

Each check does its own imports, so that a broken environment still gets its report.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from dehvf_ds.config import RunConfig

GIB = 1 << 30
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Line:
    """One line of the report: ``warn`` if some runs have a problem, ``FAIL`` if none can work."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what:<18}  {self.found:<44}  {self.remedy}".rstrip()


Check = tuple[str, Callable[[], str | Line | list[Line]]]
"""The name of a check, and a function that returns what it found, or lines of its own."""


def run_check(check: Check) -> list[Line]:
    """The lines of one check; an exception becomes a FAIL line, so that the others are still reported."""
    what, look = check
    try:
        found = look()
    # A broken package may even exit when it is imported.
    except (Exception, SystemExit) as error:
        remedy = "install the packages that are missing" if isinstance(error, ImportError) else ""
        text = re.sub(r"^(UserError|ModelError): ", "", f"{type(error).__name__}: {error}")
        found = Line("FAIL", what, " ".join(text.split()), remedy)
    if isinstance(found, str):
        found = Line("ok", what, found)
    return [found] if isinstance(found, Line) else found


def environment_checks() -> Iterator[Check]:
    """The checks of every run."""
    yield from node_checks()
    yield "deepspeed import", check_deepspeed_import
    yield "Java", check_java


def node_checks() -> Iterator[Check]:
    """The checks of every run on each node of a job."""
    yield "packages", check_packages
    yield "torch", check_torch
    yield "shared memory", check_shared_memory
    yield "open files", check_open_files
    yield "temporary files", check_temporary_space


def recipe_checks(recipe: str) -> Iterator[Check]:
    """The checks of a recipe's run; only that of the recipe if it cannot be read."""
    configs: list[RunConfig] = []

    def read() -> str:
        from dehvf_ds.config import parse_run_config

        configs.append(parse_run_config(["--config", recipe]))
        return recipe

    yield "recipe", read
    for config in configs:
        yield from run_checks(config)


def run_checks(config: RunConfig) -> Iterator[Check]:
    """The checks of a run's files."""
    yield "language model", partial(check_backbone, "language model", config.model.language_model)
    yield "vision tower", partial(check_backbone, "vision tower", config.model.vision_tower)
    yield "training shards", partial(check_shards, config)
    yield "run directory", partial(check_run_dir, config.run_dir)
    yield "DeepSpeed JSON", partial(check_deepspeed_json, config)


def read_requirements() -> list[Requirement]:
    """Python and the packages that the checkout, or else the installed package, depends on."""
    from packaging.requirements import Requirement

    if PYPROJECT.is_file():
        import tomllib

        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        python, needed = project["requires-python"], project["dependencies"]
    else:
        python = importlib.metadata.metadata("dehvf_ds")["Requires-Python"]
        needed = importlib.metadata.requires("dehvf_ds") or []
    parsed = [Requirement(text) for text in (f"Python{python}", *needed)]
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


def installed_version(name: str) -> str:
    """The version of a package, or of Python; empty if it is not installed."""
    try:
        return platform.python_version() if name == "Python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_packages() -> list[Line]:
    """Python and every required package; nothing is imported."""
    from packaging.version import Version

    lines = []
    for needed in read_requirements():
        found = installed_version(needed.name)
        # Only by its numbers: builds in NVIDIA's containers have versions such as 2.6.0a0+ecf3bae.
        if found and needed.specifier.contains(Version(found).base_version):
            lines.append(Line("ok", needed.name, found))
        else:
            problem = f"{found or 'not installed'}; needs {needed.specifier}"
            lines.append(Line("FAIL", needed.name, problem, f"pip install '{needed}'"))
    return lines


def check_torch() -> Line | str:
    """PyTorch's build, the NVIDIA driver and the GPUs; without a driver runs are on the CPU."""
    import torch

    cuda = torch.version.cuda
    found = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU build'}"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        remedy = "fine for the demo; the recipes for LLaMA need GPUs"
        return Line("warn", "torch", f"{found}, no NVIDIA driver", remedy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        reason = "".join(f"; {' '.join(str(warning.message).split())}" for warning in caught[:1])
        remedy = "install PyTorch for the driver's CUDA, or update the driver; see CUDA_VISIBLE_DEVICES too"
        return Line("FAIL", "torch", f"{found}, but no usable GPU{reason}", remedy)
    found += f", {num_gpus} x {torch.cuda.get_device_name(0)}"
    if not torch.distributed.is_nccl_available():
        return Line("FAIL", "torch", f"{found}, no NCCL", "install one of pytorch.org's Linux builds")
    return found


def check_deepspeed_import() -> Line | str:
    """Whether DeepSpeed can be imported; tried in a process of its own, which it may end."""
    command = [sys.executable, "-c", "import deepspeed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 0:
        return "works"
    found = ["", *done.stderr.strip().splitlines()][-1] or f"ended with code {done.returncode}"
    return Line("FAIL", "deepspeed import", found, "python -c 'import deepspeed' shows the whole error")


def check_java() -> Line | str:
    """Java, for METEOR and the PTB tokenizer of caption scores; not for training."""
    remedy = "caption scores need it (Debian and Ubuntu: apt-get install default-jre-headless)"
    return shutil.which("java") or Line("warn", "Java", "no `java` on the PATH", remedy)


def check_shared_memory() -> Line | str:
    """Space for the batches of loader workers, which otherwise die with "bus error"."""
    remedy = "give it more (docker run --shm-size 16g), or lower data.num_workers"
    # 32 pictures of 224 x 224 are 18 MiB in fp32, and every worker of every rank holds two batches.
    return _room("shared memory", SHARED_MEMORY, 0.125, 2, remedy)


def check_open_files() -> Line | str:
    """The limit of open files: a worker opens up to 64 shards, and a file for each tensor that it returns."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= 1024:
        return "no limit" if limit == resource.RLIM_INFINITY else str(limit)
    return Line("FAIL" if limit < 256 else "warn", "open files", str(limit), "ulimit -n 65535")


def check_temporary_space() -> Line | str:
    """Space for caption scores and for shards that are read over a network."""
    remedy = "free some space, or set TMPDIR to a directory with more"
    return _room("temporary files", Path(tempfile.gettempdir()), 0.1, 1, remedy)


def check_backbone(what: str, source: str) -> Line | str:
    """A backbone's directory, or a hub id in the local cache or on the hub."""
    if not Path(source).is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return f"{source}: in the hub's cache"
        found = f"{source}: no directory, not in the hub's cache"
        try:
            HfApi().model_info(source, timeout=5)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, OfflineModeIsEnabled | RepositoryNotFoundError):
                return Line("FAIL", what, f"{found}, and not on the hub: {reason}", "copy it here")
            # A slow hub may answer the run.
            return Line("warn", what, f"{found}; the hub does not answer: {reason}", "copy it here")
        return Line("warn", what, found, "a run will download it")
    from dehvf_ds.model.backbones import load_backbone_config

    kind = load_backbone_config(source, vision=what == "vision tower").model_type
    if not any(path.suffix in (".safetensors", ".bin") for path in Path(source).iterdir()):
        return Line("FAIL", what, f"{source}: configuration without weights", "copy *.safetensors there too")
    return f"{source}: {kind}"


def check_shards(config: RunConfig) -> str:
    """The training shards: their index, and the size of every file."""
    from dehvf_ds.data.index import ShardIndex

    index = ShardIndex.of_training(config.data)
    index.check_sizes()
    return f"{config.data.train}: {len(index):,} samples in {len(index.shard_names):,} shards"


def check_run_dir(run_dir: str) -> Line | str:
    """Whether the run can write its directory, or create it."""
    path = Path(run_dir).absolute()
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "not writable" if existing.is_dir() else "is a file"
        return Line("FAIL", "run directory", f"{existing}: {why}", "set another --run_dir")
    return _room("run directory", existing, 0, 1, "free some space, or set another --run_dir")


def check_deepspeed_json(config: RunConfig) -> str:
    """The DeepSpeed JSON: readable, and consistent with the recipe."""
    from dehvf_ds.training.deepspeed_json import read_deepspeed_json

    ds_config = read_deepspeed_json(config.deepspeed, config, 1)
    return f"{config.deepspeed}: ZeRO-{ds_config['zero_optimization'].get('stage', 0)}"


def _room(what: str, directory: Path, needed_gib: float, wanted_gib: float, remedy: str) -> Line | str:
    if not directory.is_dir():
        return Line("warn", what, f"{directory}: no such directory", remedy)
    free = shutil.disk_usage(directory).free / GIB
    found = f"{directory}: {free:.1f} GiB free"
    if free >= wanted_gib:
        return found
    return Line("FAIL" if free < needed_gib else "warn", what, found, remedy)
