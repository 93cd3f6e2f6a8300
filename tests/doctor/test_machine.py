"""This machine, and machines that lack one thing each."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dehvf_ds.doctor import machine
from dehvf_ds.doctor.report import Check, Line, run_check


def hide_program(monkeypatch, name: str) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda given: None if given == name else which(given))


def test_a_machine_without_gpus_is_one_for_the_demo() -> None:
    assert machine.check_torch().level == "ok"
    assert machine.check_nccl().level == "ok"
    assert machine.check_bf16().level == "ok"


@pytest.mark.usefixtures("gpu")
def test_a_machine_with_gpus() -> None:
    assert machine.check_torch().level == "ok"
    assert "CUDA 12.6, driver for CUDA 12.8" in machine.check_torch().found
    assert machine.check_gpus() == Line("ok", "GPUs", "2 x NVIDIA H100 80 GiB")
    assert machine.check_nccl() == Line("ok", "NCCL", "2.27.3")
    assert machine.check_bf16().level == "ok"


@pytest.mark.usefixtures("gpu")
def test_a_cpu_build_beside_a_driver_fails(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    line = machine.check_torch()
    assert line.level == "FAIL"
    assert "CUDA 12" in line.remedy


@pytest.mark.usefixtures("gpu")
def test_a_driver_that_is_too_old_fails_with_what_torch_says(monkeypatch) -> None:
    def is_available() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    line = machine.check_torch()
    assert line.level == "FAIL"
    assert "too old" in line.found
    assert "update the driver" in line.remedy


@pytest.mark.usefixtures("gpu")
def test_gpus_that_are_not_used_or_unequal_are_a_warning(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "unset DS_ACCELERATOR" in machine.check_gpus().remedy
    monkeypatch.delenv("DS_ACCELERATOR")
    names = ["NVIDIA H100", "NVIDIA A100"]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=names[i], total_memory=80 << 30),
    )
    assert machine.check_gpus().level == "warn"


@pytest.mark.usefixtures("gpu")
def test_no_nccl_and_no_bf16_on_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert machine.check_nccl().level == "FAIL"
    assert machine.check_bf16().level == "warn"


def test_without_java_training_still_works(monkeypatch) -> None:
    hide_program(monkeypatch, "java")
    line = machine.check_java()
    assert line.level == "warn"
    assert "default-jre-headless" in line.remedy


def test_a_java_that_does_not_run_is_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    result = SimpleNamespace(returncode=1, stdout="", stderr="Unable to locate a Java Runtime.\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    assert machine.check_java().level == "warn"
    assert machine.check_java().found == "Unable to locate a Java Runtime."


@pytest.mark.parametrize(("mib", "level"), [(64, "FAIL"), (1024, "warn"), (16384, "ok")])
def test_shared_memory_of_a_container(monkeypatch, set_free_space, mib: int, level: str) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/"))
    set_free_space(mib << 20)
    line = machine.check_shared_memory()
    assert line.level == level
    assert ("--shm-size" in line.remedy) == (level != "ok")


def test_a_system_without_shared_memory(monkeypatch) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", Path("/nowhere/shm"))
    assert machine.check_shared_memory().level == "warn"


@pytest.mark.parametrize(("limit", "level"), [(None, "ok"), (65535, "ok"), (512, "warn"), (128, "FAIL")])
def test_open_files(monkeypatch, limit: int | None, level: str) -> None:
    monkeypatch.setattr(machine, "open_files_limit", lambda: limit)
    assert machine.check_open_files().level == level


@pytest.mark.parametrize(("mib", "level"), [(10, "FAIL"), (500, "warn"), (5000, "ok")])
def test_temporary_space(set_free_space, mib: int, level: str) -> None:
    set_free_space(mib << 20)
    assert machine.check_temporary_space().level == level


def test_no_directory_for_temporary_files(monkeypatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    (line,) = run_check(Check("temporary files", machine.check_temporary_space))
    assert line.level == "FAIL"
    assert "No usable temporary directory" in line.found
