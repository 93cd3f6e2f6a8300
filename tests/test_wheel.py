"""What a wheel brings along: every program starts from it, in an environment without a clone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import REPOSITORY, USER_ENVIRONMENT, Server
from tiny_entries import arguments

PROGRAMS = ("train", "eval", "generate", "plan", "doctor", "export", "data.building", "report")
TRAVELS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dehvf_ds", "ds_configs")


def run(*command: object, **more) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, env=USER_ENVIRONMENT, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from copied sources, since a build leaves folders behind; asks no network."""
    directory = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *TRAVELS, cwd=REPOSITORY)
    for name in files.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (directory / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "source" / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, directory / "source")
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """An environment that sees the packages of this one, but not the clone, with the wheel installed."""
    directory = wheel.parent / "environment"
    venv.create(directory, with_pip=False)
    python = directory / "bin/python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # A folder named in a .pth file is searched; the .pth files in it, an editable install's, are not read.
    (own / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('dehvf_ds').origin)", cwd="/")
    assert Path(found.stdout.strip()).parent == own / "dehvf_ds"
    return python


def test_all_that_is_read_at_run_time_is_in_it(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = REPOSITORY / "dehvf_ds"
    given = {p.relative_to(REPOSITORY).as_posix() for p in package.rglob("*.py")}
    # Whatever is no Python and not hidden is there to be read.
    given |= {
        p.relative_to(REPOSITORY).as_posix()
        for p in package.rglob("*")
        if p.is_file() and p.suffix not in (".py", ".pyc")
    }
    given |= {f"dehvf_ds/ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*.json")}
    assert given <= inside
    assert not [name for name in inside if not name.startswith("dehvf_ds")]


@pytest.mark.slow
def test_every_program_starts_without_a_clone(python: Path, world: Path, tmp_path: Path) -> None:
    shipped = ["--deepspeed", "ds_configs/zero3.json"]
    jobs = [[f"dehvf_ds.{name}", "--help"] for name in PROGRAMS]
    jobs += [
        ["dehvf_ds.plan", "--config", "dehvf_ds/recipes/coco_llama13b.yaml", *shipped],
        ["dehvf_ds.train", *arguments(world, "wheel"), *shipped, "--dry-run"],
        ["dehvf_ds.data.building", "verify", str(world / "test")],
    ]
    server = Server(python)
    for job in jobs:
        done = server.start(["-m", *job], cwd=tmp_path)
        out, err = done.communicate(240)
        assert done.returncode == 0, (job, out, err)
        assert str(REPOSITORY) not in err, (job, err)
        if "--dry-run" in job:
            assert "the dry run passed; nothing was written" in out
    server.close()
    assert list(tmp_path.iterdir()) == []
