"""Machines to look at: one without GPUs, one with two, and disks with little room."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.cuda import nccl

from dehvf_ds.doctor import machine

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cpu(monkeypatch) -> None:
    """A machine without GPUs, wherever the tests run."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(machine, "driver_cuda", lambda: None)


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(machine, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.fixture
def set_free_space(monkeypatch) -> Callable[[int], None]:
    """Gives every disk this many free bytes."""

    def set_it(num_bytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(num_bytes, 0, num_bytes))

    return set_it
