"""The doctor's report for machines and recipes that lack one thing each, and for a bare Python."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from processes import REPOSITORY

from dehvf_ds import doctor
from dehvf_ds.cluster import environment
from dehvf_ds.cluster.environment import Line, check_backbone, check_run_dir, run_check


def look(check) -> Line:
    (line,) = run_check(("checked", check))
    return line


def test_torch_and_its_gpus(monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert look(environment.check_torch).found.endswith(", 2 x NVIDIA H100")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert str(look(environment.check_torch)).startswith("FAIL")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("Old driver", stacklevel=1)))
    line = look(environment.check_torch)
    assert (line.level, "no usable GPU; Old driver" in line.found) == ("FAIL", True)
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError))
    assert look(environment.check_torch).level == "warn"


@pytest.mark.parametrize(
    ("mib", "files", "levels"),
    [
        (64, 128, ["FAIL", "FAIL", "warn", "FAIL"]),
        (500, 512, ["warn", "warn", "warn", "warn"]),
        (4096, resource.RLIM_INFINITY, ["ok", "ok", "ok", "ok"]),
    ],
)
def test_limits_of_space_and_open_files(monkeypatch, tmp_path: Path, mib: int, files: int, levels) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=mib << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    checks = [environment.check_shared_memory, environment.check_temporary_space]
    checks += [lambda: check_run_dir(str(tmp_path / "run")), environment.check_open_files]
    assert [look(check).level for check in checks] == levels


def test_a_check_that_raises_is_a_failing_line() -> None:
    def breaks() -> str:
        raise FileNotFoundError("No usable\ndirectory")

    assert str(look(breaks)) == "FAIL  checked             FileNotFoundError: No usable directory"
    assert look(lambda: sys.exit(3)).level == "FAIL"


def test_an_installed_package_names_what_the_checkout_does(monkeypatch) -> None:
    expected = [str(needed) for needed in environment.read_requirements()]
    given = [*expected[1:], 'ruff>=99; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: given)
    monkeypatch.setattr(environment, "PYPROJECT", Path("/nowhere"))
    assert [str(needed) for needed in environment.read_requirements()] == expected


@pytest.mark.parametrize(
    ("name", "version", "needs"),
    [
        ("torch", "2.6.0a0+ecf3bae", ""),  # in NVIDIA's containers
        ("peft", "", ">=0.18"),
        ("Python", "3.10.4", ">=3.11"),
    ],
)
def test_a_wrong_version_fails_with_its_remedy(monkeypatch, name, version, needs) -> None:
    found = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda n: version if n == name else found(n))
    failing = [line for line in environment.check_packages() if line.level == "FAIL"]
    told = f"{version or 'not installed'}; needs {needs}"
    assert failing == ([Line("FAIL", name, told, f"pip install '{name}{needs}'")] if needs else [])


@pytest.mark.parametrize(
    ("replaced", "what", "found"),
    [
        ("", "", ""),
        ("tower", "vision tower", "/nowhere/x: no such directory"),
        ("train", "training shards", "/nowhere/x"),
        ("ds.json", "DeepSpeed JSON", "/nowhere/x: no such file"),
    ],
)
def test_what_a_recipe_lacks_fails_alone(world, tmp_path, capsys, monkeypatch, replaced, what, found) -> None:
    monkeypatch.setattr(doctor, "environment_checks", lambda: iter(()))
    paths = {name: world / name for name in ("llm", "tower", "train", "ds.json")} | {replaced: "/nowhere/x"}
    (tmp_path / "recipe.yaml").write_text(
        f"run_dir: {tmp_path}/run\n"
        f"model: {{language_model: {paths['llm']}, vision_tower: {paths['tower']}}}\n"
        f"data: {{train: {paths['train']}}}\n"
        f"deepspeed: {paths['ds.json']}\n"
    )
    code = doctor.main(["--config", str(tmp_path / "recipe.yaml")])
    lines = {line[6:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert list(lines)[:3] == ["recipe", "language model", "vision tower"]
    assert list(lines)[3:] == ["training shards", "run directory", "DeepSpeed JSON"]
    assert [name for name, line in lines.items() if line.startswith("FAIL")] == ([what] if what else [])
    assert found in lines.get(what, "")
    assert code == bool(what)


def test_backbones_without_weights_and_on_the_hub(world: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copy(world / "llm/config.json", tmp_path)
    assert look(lambda: check_backbone("language model", str(tmp_path))).found.endswith("without weights")
    on_the_hub = lambda: check_backbone("language model", "owner/some-7b")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "and not on the hub: " in look(on_the_hub).found
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
    assert look(on_the_hub).level == "warn"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: "/cache/config.json")
    assert look(on_the_hub).level == "ok"


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert look(lambda: check_run_dir(str(tmp_path / "file/run"))).level == "FAIL"
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert look(lambda: check_run_dir(str(tmp_path / "a/b"))).level == "FAIL"


def test_a_bare_interpreter_gets_its_report_too() -> None:
    """No package of ours, torch included: an isolated interpreter without site-packages."""
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "dehvf_ds/doctor.py"), "--config", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert all(f"FAIL  {what} " in done.stdout for what in ("packages", "torch", "recipe")), done.stdout
    assert "shared memory" in done.stdout
