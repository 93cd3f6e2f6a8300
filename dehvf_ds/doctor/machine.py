"""The machine: GPUs and what reaches them, Java, memory and limits."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from dehvf_ds.doctor.report import GIB, MIB, Line, format_bytes

SHARED_MEMORY = Path("/dev/shm")


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
    found = f"{SHARED_MEMORY}: {format_bytes(free)} free"
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
    """The directory of temporary files: caption scores and shards that are read over a network lie there."""
    # Raises where no directory can be written.
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    found = f"{directory}: {format_bytes(free)} free"
    remedy = "make room, or point TMPDIR at a directory with more"
    if free < 100 * MIB:
        return Line("FAIL", "temporary files", found, remedy)
    if free < GIB:
        return Line("warn", "temporary files", found, remedy)
    return Line("ok", "temporary files", found)
