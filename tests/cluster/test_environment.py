"""The doctor's report: of machines and recipes that lack one thing each, and of a bare Python."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from training.launch import REPOSITORY

from dehvf_ds import doctor
from dehvf_ds.cluster import environment
from dehvf_ds.cluster.environment import Line, run_check


@pytest.fixture
def gpus(monkeypatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def level(check) -> str:
    (line,) = run_check(("checked", check))
    return line.level


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("lacks", ["nothing", "CUDA build", "driver", "newer driver", "NCCL"])
def test_torch_and_its_gpus(monkeypatch, lacks: str) -> None:
    def no_gpu() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    if lacks == "driver":
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    if lacks in ("CUDA build", "newer driver"):
        monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    if lacks == "NCCL":
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (line,) = run_check(("torch", environment.check_torch))
    assert line.level == {"nothing": "ok", "driver": "warn"}.get(lacks, "FAIL")
    assert ("2 x NVIDIA H100" in line.found) == (lacks in ("nothing", "NCCL"))
    assert ("driver on your system is too old" in line.found) == (line.level == "FAIL" and lacks != "NCCL")


@pytest.mark.parametrize(
    ("look", "mib", "expected"),
    [
        (environment.check_shared_memory, 64, "FAIL"),
        (environment.check_shared_memory, 1024, "warn"),
        (environment.check_shared_memory, 4096, "ok"),
        (environment.check_temporary_space, 10, "FAIL"),
        (environment.check_temporary_space, 500, "warn"),
        (lambda: environment.check_run_dir("/tmp/x"), 10, "warn"),
        (lambda: environment.check_run_dir("/tmp/x"), 5000, "ok"),
    ],
)
def test_room(monkeypatch, look, mib: int, expected: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=mib << 20))
    assert level(look) == expected


def test_what_breaks_is_a_failing_line(monkeypatch) -> None:
    def no_directory() -> str:
        raise FileNotFoundError("No usable temporary\ndirectory")

    monkeypatch.setattr(tempfile, "gettempdir", no_directory)
    (line,) = run_check(("temporary files", environment.check_temporary_space))
    assert str(line) == "FAIL  temporary files     FileNotFoundError: No usable temporary directory"
    assert level(lambda: sys.exit(3)) == "FAIL"


def test_java_is_for_scores_alone(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert level(environment.check_java) == "warn"


@pytest.mark.parametrize(
    ("name", "version", "needs"),
    [
        ("torch", "2.6.0a0+ecf3bae", ""),
        ("torch", "2.5.1", ">=2.6"),
        ("deepspeed", "0.18.0", "<0.20,>=0.19.3"),
        ("transformers", "6.0.0.dev1", "<6,>=5.0"),
        ("peft", "", ">=0.18"),
        ("Python", "3.10.4", ">=3.11"),
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_a_wrong_version_fails_with_its_remedy(monkeypatch, name, version, needs, installed) -> None:
    if installed:
        given = [*map(str, environment.read_requirements()[1:]), 'ruff>=99; extra == "dev"']
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: given)
        monkeypatch.setattr(environment, "PYPROJECT", Path("/nowhere"))
    found = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda n: version if n == name else found(n))
    failing = [line for line in environment.check_packages() if line.level == "FAIL"]
    told = f"{version or 'not installed'}; needs {needs}"
    assert failing == ([Line("FAIL", name, told, f"pip install '{name}{needs}'")] if needs else [])


@pytest.mark.parametrize(
    ("code", "stderr", "found"),
    [
        (0, "", "works"),
        (1, "Traceback\nImportError: no\n", "ImportError: no"),
        (-11, "", "ended with code -11"),
    ],
)
def test_a_deepspeed_that_does_not_import_fails(monkeypatch, code: int, stderr: str, found: str) -> None:
    done = SimpleNamespace(returncode=code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    (line,) = run_check(("deepspeed import", environment.check_deepspeed_import))
    assert (line.level, line.found) == ("FAIL" if code else "ok", found)


@pytest.mark.parametrize(
    ("replaced", "what", "found"),
    [
        ("", "", ""),
        ("llm", "language model", "/nowhere/x: no such directory"),
        ("tower", "vision tower", "/nowhere/x: no such directory"),
        ("train", "training shards", "/nowhere/x"),
        ("ds.json", "DeepSpeed JSON", "/nowhere/x: no such file"),
        ("recipe", "recipe", "no such file"),
    ],
)
def test_a_recipe_lacks_what_fails_alone(
    world: Path, tmp_path: Path, capsys, monkeypatch, replaced: str, what: str, found: str
) -> None:
    monkeypatch.setattr(doctor, "environment_checks", lambda: iter(()))
    paths = {name: world / name for name in ("llm", "tower", "train", "ds.json")} | {replaced: "/nowhere/x"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path}/run\n"
        f"model: {{language_model: {paths['llm']}, vision_tower: {paths['tower']}}}\n"
        f"data: {{train: {paths['train']}}}\n"
        f"deepspeed: {paths['ds.json']}\n"
    )
    code = doctor.main(["--config", "no-such-recipe" if replaced == "recipe" else str(recipe)])
    lines = {line[6:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    if replaced != "recipe":
        names = ["recipe", "language model", "vision tower", "training shards", "run directory"]
        assert list(lines) == [*names, "DeepSpeed JSON"]
        assert "24 samples in 5 shards" in lines["training shards"] or what == "training shards"
    assert [name for name, line in lines.items() if line.startswith("FAIL")] == ([what] if what else [])
    assert found in lines.get(what, "")
    assert code == bool(what)


def test_backbones_without_weights_and_on_the_hub(world: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copy(world / "llm/config.json", tmp_path)
    assert (
        "without weights"
        in run_check(("", lambda: environment.check_backbone("language model", str(tmp_path))))[0].found
    )
    for cached, expected in (("/cache/config.json", "ok"), (None, "warn")):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, cached=cached: cached)
        assert level(lambda: environment.check_backbone("language model", "owner/some-7b")) == expected


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert level(lambda: environment.check_run_dir(str(tmp_path / "file/run"))) == "FAIL"
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert level(lambda: environment.check_run_dir(str(tmp_path / "a/b"))) == "FAIL"


def test_a_bare_interpreter_gets_its_report_too() -> None:
    """No package of ours, torch included: an isolated interpreter without site-packages."""
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "dehvf_ds/doctor.py"), "--config", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    for what in ("packages", "torch", "recipe"):
        assert f"FAIL  {what} " in done.stdout
    assert "shared memory" in done.stdout
