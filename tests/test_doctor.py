"""The doctor on this machine, and on machines that lack one thing each."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import text_config, vision_config
from torch.cuda import nccl
from training.launch import REPOSITORY
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds import doctor
from dehvf_ds.doctor import Check, Line, format_line, main, run_check

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cpu(monkeypatch) -> None:
    """A machine without GPUs, wherever the tests run."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(doctor, "driver_cuda", lambda: None)


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(doctor, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def hide_program(monkeypatch, name: str) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda given: None if given == name else which(given))


def set_free_space(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(num_bytes, 0, num_bytes))


# The report


def test_columns_are_aligned_and_the_remedy_comes_last() -> None:
    lines = [format_line(Line("ok", "Python", "3.11")), format_line(Line("FAIL", "Java", "none", "get it"))]
    assert lines[0] == "ok    Python              3.11"
    assert lines[1].startswith("FAIL  Java                none ")
    assert lines[1].endswith("  get it")


@pytest.mark.parametrize(
    ("error", "found"),
    [(ValueError("a\nb"), "ValueError: a b"), (SystemExit(3), "SystemExit: 3"), (OSError("x"), "OSError: x")],
)
def test_a_check_that_breaks_is_one_failing_line(error: BaseException, found: str) -> None:
    def look() -> Line:
        raise error

    (line,) = run_check(Check("thing", look))
    assert (line.level, line.what, line.found) == ("FAIL", "thing", found)
    assert line.remedy


def test_wrong_flags_are_one_line_and_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--confg", "demo"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --confg demo\n"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_the_exit_code_says_whether_anything_fails(monkeypatch, capsys, level, code: int) -> None:
    checks = [Check("a", lambda: Line("ok", "a", "x")), Check("b", lambda: Line(level, "b", "y", "z"))]
    monkeypatch.setattr(doctor, "environment_checks", lambda: iter(checks))
    assert main([]) == code
    assert capsys.readouterr().out.splitlines()[1].startswith(level)


def test_every_environment_check_reports(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "check_deepspeed_import", lambda: Line("ok", "deepspeed import", "works"))
    main([])
    whats = [line[6:24].strip() for line in capsys.readouterr().out.splitlines()]
    assert whats[0] == "Python"
    assert {"torch", "deepspeed", "torch build", "NCCL", "bf16", "ninja", "Java", "shared memory"} <= set(
        whats
    )


def test_a_bare_interpreter_gets_its_report_too() -> None:
    """No package of ours, torch included: an isolated interpreter without site-packages."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", str(REPOSITORY / "dehvf_ds/doctor.py"), "--config", "demo"],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert sum(line.startswith("FAIL  torch ") and "pip install 'torch>=" in line for line in lines) == 1
    assert any(line.startswith("FAIL  recipe") for line in lines)
    assert any("shared memory" in line for line in lines)


@pytest.mark.slow
def test_this_environment_has_no_failing_package() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dehvf_ds.doctor"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    failing = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    # The machine's own lacks are its own; the environment is the Makefile's.
    assert not [line for line in failing if "pip install" in line and "ninja" not in line], failing
    assert "deepspeed import    works" in result.stdout


# Python and its packages


def test_the_smallest_python_is_that_of_the_project() -> None:
    assert (
        f'requires-python = ">={doctor.MIN_PYTHON[0]}.{doctor.MIN_PYTHON[1]}"' in doctor.PYPROJECT.read_text()
    )
    assert doctor.check_python().level == "ok"


def test_an_old_python_fails(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert doctor.check_python().level == "FAIL"
    assert "3.11" in doctor.check_python().remedy


def test_requirements_are_understood_from_the_checkout_and_from_the_installed_package(monkeypatch) -> None:
    from_checkout = dict(map(doctor.parse_requirement, doctor.read_requirements()))
    assert from_checkout["jsonargparse"] == "4.40"
    given = ["torch>=2.6", "jsonargparse[signatures]>=4.40", 'ruff>=0.9; extra == "dev"']
    monkeypatch.setattr(doctor, "PYPROJECT", Path("/nowhere/pyproject.toml"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: given)
    assert doctor.read_requirements() == given[:2]
    with pytest.raises(ValueError, match="torch==2"):
        doctor.parse_requirement("torch==2")


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [("0.19.2", "0.19.3"), ("2.6", "2.13.0+cpu"), ("9.9", "10"), ("0.9.1rc1", "0.10"), ("2.6.0", "2.6.1")],
)
def test_versions_are_compared_by_number(smaller: str, larger: str) -> None:
    assert doctor.version_key(smaller) < doctor.version_key(larger)


def test_equal_versions_may_be_written_shorter() -> None:
    assert doctor.version_key("10") == doctor.version_key("10.0.0+cu124")


def test_an_old_package_and_a_missing_one_fail_with_the_command(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.18.0" if name == "deepspeed" else "99"

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = {line.what: line for line in doctor.check_packages()}
    failing = {what for what, line in lines.items() if line.level == "FAIL"}
    assert failing == {"deepspeed", "peft"}
    assert lines["deepspeed"].found.startswith("0.18.0; needs >= ")
    assert lines["peft"].found.startswith("not installed")
    assert lines["peft"].remedy.startswith("pip install 'peft>=")


def test_deepspeed_is_not_started_where_it_is_missing(monkeypatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started"))
    assert doctor.check_deepspeed_import().level == "FAIL"


@pytest.mark.parametrize(
    ("code", "stderr", "found"),
    [(1, "Traceback\nImportError: no nvcc\n", "ImportError: no nvcc"), (-11, "", "ended with code -11")],
)
def test_a_deepspeed_that_does_not_import_fails(monkeypatch, code: int, stderr: str, found: str) -> None:
    result = SimpleNamespace(returncode=code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    line = doctor.check_deepspeed_import()
    assert (line.level, line.found) == ("FAIL", found)


# The device


def test_a_machine_without_gpus_is_one_for_the_demo() -> None:
    assert doctor.check_torch().level == "ok"
    assert doctor.check_nccl().level == "ok"
    assert doctor.check_bf16().level == "ok"


@pytest.mark.usefixtures("gpu")
def test_a_machine_with_gpus() -> None:
    assert doctor.check_torch().level == "ok"
    assert "CUDA 12.6, driver for CUDA 12.8" in doctor.check_torch().found
    assert doctor.check_gpus() == Line("ok", "GPUs", "2 x NVIDIA H100 80 GiB")
    assert doctor.check_nccl() == Line("ok", "NCCL", "2.27.3")
    assert doctor.check_bf16().level == "ok"


@pytest.mark.usefixtures("gpu")
def test_a_cpu_build_beside_a_driver_fails(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    line = doctor.check_torch()
    assert line.level == "FAIL"
    assert "CUDA 12" in line.remedy


@pytest.mark.usefixtures("gpu")
def test_a_driver_that_is_too_old_fails_with_what_torch_says(monkeypatch) -> None:
    def is_available() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    line = doctor.check_torch()
    assert line.level == "FAIL"
    assert "too old" in line.found
    assert "update the driver" in line.remedy


@pytest.mark.usefixtures("gpu")
def test_gpus_that_are_not_used_or_unequal_are_a_warning(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "unset DS_ACCELERATOR" in doctor.check_gpus().remedy
    monkeypatch.delenv("DS_ACCELERATOR")
    names = ["NVIDIA H100", "NVIDIA A100"]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=names[i], total_memory=80 << 30),
    )
    assert doctor.check_gpus().level == "warn"


@pytest.mark.usefixtures("gpu")
def test_no_nccl_and_no_bf16_on_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert doctor.check_nccl().level == "FAIL"
    assert doctor.check_bf16().level == "warn"


def test_a_cpu_run_needs_a_compiler_and_ninja(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.check_compiler().level == "FAIL"
    assert "g++" in doctor.check_compiler().remedy
    hide_program(monkeypatch, "ninja")
    assert doctor.check_ninja().level == "FAIL"


def test_a_ninja_off_the_path_is_found_beside_the_interpreter(monkeypatch, tmp_path: Path) -> None:
    hide_program(monkeypatch, "ninja")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor.check_ninja().remedy == "pip install ninja"
    (tmp_path / "ninja").touch()
    assert doctor.check_ninja().remedy == f"activate the environment: {tmp_path} has it"


@pytest.mark.usefixtures("gpu")
def test_gpus_need_neither(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.check_compiler().level == "ok"
    assert doctor.check_ninja().level == "ok"


# The machine


def test_without_java_training_still_works(monkeypatch) -> None:
    hide_program(monkeypatch, "java")
    line = doctor.check_java()
    assert line.level == "warn"
    assert "default-jre-headless" in line.remedy


def test_a_java_that_does_not_run_is_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    result = SimpleNamespace(returncode=1, stdout="", stderr="Unable to locate a Java Runtime.\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)
    assert doctor.check_java().level == "warn"
    assert doctor.check_java().found == "Unable to locate a Java Runtime."


@pytest.mark.parametrize(("mib", "level"), [(64, "FAIL"), (1024, "warn"), (16384, "ok")])
def test_shared_memory_of_a_container(monkeypatch, mib: int, level: str) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", Path("/"))
    set_free_space(monkeypatch, mib << 20)
    line = doctor.check_shared_memory()
    assert line.level == level
    assert ("--shm-size" in line.remedy) == (level != "ok")


def test_a_system_without_shared_memory(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", Path("/nowhere/shm"))
    assert doctor.check_shared_memory().level == "warn"


@pytest.mark.parametrize(("limit", "level"), [(None, "ok"), (65535, "ok"), (512, "warn"), (128, "FAIL")])
def test_open_files(monkeypatch, limit: int | None, level: str) -> None:
    monkeypatch.setattr(doctor, "open_files_limit", lambda: limit)
    assert doctor.check_open_files().level == level


@pytest.mark.parametrize(("mib", "level"), [(10, "FAIL"), (500, "warn"), (5000, "ok")])
def test_temporary_space(monkeypatch, mib: int, level: str) -> None:
    set_free_space(monkeypatch, mib << 20)
    assert doctor.check_temporary_space().level == level


def test_no_directory_for_temporary_files(monkeypatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    (line,) = run_check(Check("temporary files", doctor.check_temporary_space))
    assert line.level == "FAIL"
    assert "No usable temporary directory" in line.found


# A recipe's run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Tiny backbones, a shard of scenes and a recipe that names them."""
    from tools.build_shards import main as build_shards
    from tools.make_scenes import main as make_scenes

    root = tmp_path_factory.mktemp("doctor")
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(root / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(root / "tower")
    make_scenes(["--output", str(root / "scenes"), "--train", "6", "--val", "1", "--test", "1"])
    annotations = root / "scenes/annotations/captions_train.json"
    given = ["coco", "--annotations", str(annotations), "--images", str(root / "scenes/images/train")]
    assert build_shards([*given, "--output", str(root / "train")]) == 0
    (root / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return root


def recipe_lines(world: Path, capsys, monkeypatch, **replaced: str) -> tuple[int, dict[str, str]]:
    """Exit code and lines by what they are about, for the recipe with some paths replaced."""
    paths = {name: str(world / name) for name in ("llm", "tower", "train", "runs")} | replaced
    ds = paths.get("ds", str(world / "ds.json"))
    (world / "recipe.yaml").write_text(
        f"run_dir: {paths['runs']}\n"
        f"model: {{language_model: {paths['llm']}, vision_tower: {paths['tower']}}}\n"
        f"data: {{train: {paths['train']}}}\n"
        f"deepspeed: {ds}\n"
    )
    monkeypatch.setattr(doctor, "environment_checks", lambda: iter(()))
    code = main(["--config", str(world / "recipe.yaml")])
    return code, {line[6:24].strip(): line for line in capsys.readouterr().out.splitlines()}


def test_a_recipe_that_is_ready(world: Path, capsys, monkeypatch) -> None:
    set_free_space(monkeypatch, 1 << 40)
    code, lines = recipe_lines(world, capsys, monkeypatch)
    assert list(lines) == [
        "recipe",
        "language model",
        "vision tower",
        "training shards",
        "run directory",
        "DeepSpeed JSON",
    ]
    assert all(line.startswith("ok") for line in lines.values())
    assert code == 0
    assert "6 samples in 1 shards" in lines["training shards"]
    assert "ZeRO-3, float32" in lines["DeepSpeed JSON"]


@pytest.mark.parametrize(
    ("name", "what", "found"),
    [
        ("llm", "language model", "/nowhere/x: no such directory"),
        ("tower", "vision tower", "/nowhere/x: no such directory"),
        ("train", "training shards", "/nowhere/x"),
        ("ds", "DeepSpeed JSON", "/nowhere/x: no such file"),
    ],
)
def test_a_missing_path_fails_alone(world: Path, capsys, monkeypatch, name, what, found) -> None:
    set_free_space(monkeypatch, 1 << 40)
    code, lines = recipe_lines(world, capsys, monkeypatch, **{name: "/nowhere/x"})
    assert code == 1
    assert [key for key, line in lines.items() if not line.startswith("ok")] == [what]
    assert lines[what].startswith("FAIL")
    assert found in lines[what]


def test_a_recipe_that_cannot_be_read_is_the_last_line(world: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "environment_checks", lambda: iter(()))
    assert main(["--config", "no-such-recipe"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  recipe")
    assert "no such file, nor a recipe" in line


def test_a_backbone_without_weights_fails(tmp_path: Path) -> None:
    text_config().save_pretrained(tmp_path)
    line = doctor.check_backbone("language model", str(tmp_path))
    assert line.level == "FAIL"
    assert "without weights" in line.found


@pytest.mark.parametrize(
    ("cached", "offline", "level"),
    [("/cache/config.json", True, "ok"), (None, True, "FAIL"), (None, False, "warn")],
)
def test_a_hub_id_is_looked_up_in_the_cache_alone(monkeypatch, cached, offline: bool, level: str) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: cached)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert doctor.check_backbone("language model", "owner/some-7b").level == level


def test_a_run_directory_that_cannot_be_written_fails(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in doctor.check_run_dir(str(tmp_path / "file" / "run")).found
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = doctor.check_run_dir(str(tmp_path / "a" / "b"))
    assert line.level == "FAIL"
    assert line.found == f"{tmp_path}: not writable"


def test_a_full_disk_for_the_run_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    set_free_space(monkeypatch, 100 << 20)
    assert doctor.check_run_dir(str(tmp_path)).level == "warn"
