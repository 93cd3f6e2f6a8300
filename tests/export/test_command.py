"""The command as a user starts it: what it writes, what it proves, and every mistake by name."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny_artifacts import build_bases, save, trained_model
from transformers import AutoModelForImageTextToText

from dehvf_ds.config import UserError
from dehvf_ds.export import merge as merging
from dehvf_ds.export.__main__ import main as merge
from dehvf_ds.model.adapter import EXPORT_FILE, find_trained


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bases in ``llm`` and ``tower``, an artifact over them in ``run/adapter``."""
    bases = build_bases(tmp_path)
    # Small changes: a wild model amplifies the rounding of fp32.
    model = trained_model(bases, scale=0.1, task="caption", prompt="Picture:")
    save(model, bases, tmp_path / "run/adapter")
    return tmp_path


def given(root: Path, *more: str, output: str = "model") -> list[str]:
    return ["--checkpoint", str(root / "run"), "--output", str(root / output), *more]


def left_by(root: Path) -> set[str]:
    """What lies beside the bases and the run."""
    return {path.name for path in root.iterdir()} - {"llm", "tower", "run"}


def test_a_complete_directory(root) -> None:
    (root / "llm/LICENSE").write_text("terms")
    shutil.copytree(root / "run", root / "run/checkpoints/step_00000007")
    checkpoint = ["--checkpoint", str(root / "run/checkpoints/step_00000007")]
    assert merge(given(root, *checkpoint, "--dtype", "fp16", "--max-shard-size", "50KB")) == 0
    model = root / "model"
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    needed = "generation_config.json processor_config.json tokenizer.json README.md modeling.py"
    assert {*needed.split(), "licences/language_model/LICENSE"} <= files
    weights = {name for name in files if name.endswith(".safetensors")}
    record = json.loads((model / EXPORT_FILE).read_text())
    assert record["files"].keys() == weights
    assert len(weights) > 2
    assert json.loads((model / "config.json").read_text())["dtype"] == "float16"
    assert left_by(root) == {"model"}
    with pytest.raises(UserError, match="is merged already"):
        merge(["--checkpoint", str(model), "--output", str(root / "again")])


def test_only_what_was_trained_without_what_lies_beside_it(root) -> None:
    (root / "run/adapter/notes.txt").write_text("mine")
    assert merge(given(root, "--adapter-only", output="run/adapter/alone")) == 0
    alone = root / "run/adapter/alone"
    found = {path.name for path in alone.rglob("*") if path.is_file()}
    trained = {"dehvf_config.json", "manifest.json", "visual.safetensors"}
    assert found == trained | {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert find_trained(alone).fingerprint() == find_trained(root / "run").fingerprint()


def test_it_proves_what_it_writes(root, world, capsys) -> None:
    more = ["--verify", "--verify-data", str(world / "test"), "--verify-rows", "3", "--dtype", "bf16"]
    assert merge(given(root, *more)) == 0
    fold, files, rounded = capsys.readouterr().out.splitlines()[:3]
    assert fold.startswith("fp32 fold: logits differ by at most ")
    assert "the answer for 3 of 3 rows" in fold
    assert files.startswith("files: all ")
    share = float(rounded.removeprefix("bfloat16: logits differ by at most ").split()[0])
    assert 1e-4 < share < 1  # a random model is touchy


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("dehvf_ds.export.merge.folded_weight", r"8 tensors differ from the trained ones, .*mlp\.ffn\."),
        ("dehvf_ds.model.ffn.folded_weight", r"folding changes the logits by .* of the largest"),
    ],
)
def test_a_wrong_fold_is_found_and_not_exported(root, world, monkeypatch, where, message) -> None:
    monkeypatch.setattr(where, lambda weight, a, b, scaling: weight.float() + 1.01 * scaling * (b @ a))
    with pytest.raises(UserError, match=f"not exported: {message}"):
        merge(given(root, "--verify", "--verify-data", str(world / "test"), "--verify-rows", "1"))
    assert left_by(root) == set()


def test_verify_needs_rows_and_memory(root, world, monkeypatch) -> None:
    with pytest.raises(UserError, match="is in no run; name shards with --verify-data"):
        merge(given(root, "--verify"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(UserError, match=r"in fp32 and its export beside it, .* GB are free"):
        merge(given(root, "--verify", "--verify-data", str(world / "test")))
    assert left_by(root) == set()


def test_an_output_in_use_is_left_alone(root) -> None:
    (root / "model").mkdir()
    (root / "model/thesis.txt").write_text("mine")
    shutil.copytree(root / "run", root / "other")
    for name in ("model", "model/thesis.txt", "other/adapter"):
        for more in ([], ["--force"]):
            with pytest.raises(UserError, match="already exists; name another; it holds no earlier export"):
                merge(given(root, *more, output=name))
    assert (root / "model/thesis.txt").read_text() == "mine"
    assert (root / "other/adapter/manifest.json").is_file()
    # What --adapter-only wrote is an export.
    assert merge(given(root, "--adapter-only", output="only")) == 0
    with pytest.raises(
        UserError, match="already exists; name another, or pass --force to replace this export"
    ):
        merge(given(root, "--adapter-only", output="only"))


@pytest.mark.parametrize("name", ["run/adapter", "run", "tower", "link/adapter", "home", "cwd/.."])
def test_force_replaces_nothing_that_the_export_or_the_user_needs(root, monkeypatch, name) -> None:
    (root / "link").symlink_to(root / "run")
    (root / "home").mkdir()
    (root / "cwd/deep").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.chdir(root / "cwd/deep")
    for place in ("run", "llm", "tower", "home", "cwd", "."):
        (root / place / EXPORT_FILE).touch()  # as if exports lay there
    (root / "run/adapter/README.md").touch()
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(UserError, match=r"is or holds .*; name another"):
        merge(given(root, "--force", output=name))
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before


def test_force_replaces_an_export_once_the_new_one_is_complete(root, monkeypatch) -> None:
    (root / "disk").mkdir()
    (root / "model").symlink_to(root / "disk")
    assert merge(given(root, "--dtype", "fp32")) == 0
    (root / "disk/old.txt").touch()
    before = (root / "model/model.safetensors").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(given(root, "--dtype", "bf16", "--force"))
    assert (root / "model/model.safetensors").read_bytes() == before
    assert left_by(root) == {"disk", "model"}
    assert merge(given(root, "--dtype", "bf16", "--force")) == 0
    # What the link points to is replaced, as a whole.
    assert (root / "model").is_symlink()
    assert (root / "disk/model.safetensors").stat().st_size < 0.6 * len(before)
    assert not (root / "disk/old.txt").exists()
    assert left_by(root) == {"disk", "model"}


FULL_THEN_KILLED = """
import resource, signal, sys
from dehvf_ds.config import UserError
from dehvf_ds.export.__main__ import main

# The kernel refuses to let a file grow beyond this, as it does on a full disk ..
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    main(sys.argv[1:])
except UserError as error:
    print(error, flush=True)
# .. and without a handler kills who tries.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_and_a_killed_merge_leave_nothing_that_looks_finished(root) -> None:
    command = [sys.executable, "-c", FULL_THEN_KILLED, *given(root)]
    killed = subprocess.run(command, cwd="/", stdout=subprocess.PIPE, text=True, check=False)
    assert "model: not written: " in killed.stdout
    assert killed.returncode == -signal.SIGXFSZ
    assert left_by(root) == {".model.part"}
    with pytest.raises((OSError, ValueError, SafetensorError)):
        AutoModelForImageTextToText.from_pretrained(root / ".model.part", local_files_only=True)
    assert merge(given(root)) == 0
    assert left_by(root) == {"model"}


def test_an_output_that_cannot_be_written_is_named(root, monkeypatch) -> None:
    (root / "run/file").write_text("")
    with pytest.raises(UserError, match="not written: Not a directory"):
        merge(given(root, output="run/file/model"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"--output needs 0\.0 GB, 0\.0 GB are free there"):
        merge(given(root))
    assert left_by(root) == set()
