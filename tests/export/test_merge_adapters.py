"""The command as a user starts it: what it writes, what it proves, and every mistake by name."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import DECODER, build_bases, save, trained_model
from tiny_entries import arguments, start
from tiny_models import text_config
from training.launch import REPOSITORY, run_ranks
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dehvf_ds.config import UserError
from dehvf_ds.export import directory, pieces, shards
from dehvf_ds.model.weights import EXPORT_FILE, find_trained
from tools import merge_adapters

merge = merge_adapters.main


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
    assert merge(given(root, "--dtype", "fp16", "--max-shard-size", "50KB")) == 0
    files = {
        path.relative_to(root / "model").as_posix() for path in (root / "model").rglob("*") if path.is_file()
    }
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "processor_config.json",
    }
    needed |= {"tokenizer.json", "tokenizer_config.json", "README.md", "export.json", "modeling.py"}
    assert needed | {"licences/language_model/LICENSE"} <= files
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 2
    record = json.loads((root / "model/export.json").read_text())
    assert record["files"].keys() == weights
    assert record["adapters"] == "folded"
    assert json.loads((root / "model/config.json").read_text())["dtype"] == "float16"
    assert left_by(root) == {"model"}


def test_only_what_was_trained(root) -> None:
    assert merge(given(root, "--adapter-only")) == 0
    found, source = find_trained(root / "model"), find_trained(root / "run")
    assert found.fingerprint() == source.fingerprint()
    assert (root / "model/README.md").read_text().startswith("---\nlibrary_name: dehvf_ds")
    # Onto the same decoder, stored otherwise.
    half = AutoModelForCausalLM.from_pretrained(root / "llm", dtype=torch.bfloat16)
    half.save_pretrained(root / "half", max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "half" / name).write_bytes((root / "llm" / name).read_bytes())
    moved = find_trained(root / "model", language_model=str(root / "half")).load("fp32")
    assert moved.load_state_dict(moved.state_dict())


def test_it_proves_what_it_writes(root, world, capsys) -> None:
    more = ["--verify", "--verify-data", str(world / "test"), "--verify-rows", "3", "--dtype", "bf16"]
    assert merge(given(root, *more)) == 0
    fold, files, rounded = capsys.readouterr().out.splitlines()[:3]
    assert fold.startswith("fp32 fold: logits differ by at most ")
    assert "3 of 3 greedy answers are the same" in fold
    assert files.startswith("files: all ")
    assert rounded.startswith("bfloat16: logits differ by at most ")
    share = float(rounded.split("at most ")[1].split()[0])
    assert 1e-4 < share < 1  # a random model is touchy


def test_a_wrong_fold_is_found_and_not_exported(root, world, monkeypatch) -> None:
    monkeypatch.setattr(
        pieces, "folded_weight", lambda weight, a, b, scaling: weight.float() + 1.01 * scaling * (b @ a)
    )
    more = ["--verify", "--verify-data", str(world / "test"), "--verify-rows", "1"]
    with pytest.raises(UserError, match=r"not exported: 8 tensors are not the trained ones, .*mlp\.ffn\."):
        merge(given(root, *more))
    assert left_by(root) == set()


def test_verify_needs_rows_and_memory(root, world, monkeypatch) -> None:
    with pytest.raises(UserError, match="is in no run; name shards with --verify-data"):
        merge(given(root, "--verify"))
    with pytest.raises(UserError, match="rows are of another task than the model's, caption"):
        merge(given(root, "--verify", "--verify-data", str(world / "scienceqa")))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(UserError, match=r"in fp32 and its export beside it, .* GB are free"):
        merge(given(root, "--verify", "--verify-data", str(world / "test")))
    assert left_by(root) == set()


def test_an_output_in_use_is_left_alone(root) -> None:
    (root / "model").mkdir()
    (root / "model/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"model is not empty; name another, or pass --force"):
        merge(given(root))
    with pytest.raises(UserError, match=r"model holds no earlier export, so --force does not replace it"):
        merge(given(root, "--force"))
    with pytest.raises(UserError, match=r"thesis\.txt is a file; name a directory"):
        merge(given(root, output="model/thesis.txt"))
    assert (root / "model/thesis.txt").read_text() == "mine"
    # A run is no export either.
    with pytest.raises(UserError, match="is or holds --checkpoint"):
        merge(given(root, "--force", output="run"))


@pytest.mark.parametrize(
    "name", ["run/adapter", "run", "llm", "tower", ".", "..", "link/adapter", "home", "cwd/.."]
)
@pytest.mark.parametrize("more", [[], ["--adapter-only"]])
def test_force_replaces_nothing_that_the_export_or_the_user_needs(root, monkeypatch, name, more) -> None:
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
        merge(given(root, "--force", *more, output=name))
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before


def test_force_replaces_no_artifact_of_another_run(root) -> None:
    shutil.copytree(root / "run", root / "other")
    with pytest.raises(UserError, match="holds no earlier export"):
        merge(given(root, "--force", "--adapter-only", output="other/adapter"))
    assert (root / "other/adapter/manifest.json").is_file()
    # What --adapter-only wrote is an export.
    for more in ([], ["--force"]):
        assert merge(given(root, "--adapter-only", *more, output="only")) == 0


def test_force_through_a_link_replaces_what_it_points_to(root) -> None:
    assert merge(given(root, "--adapter-only", output="disk")) == 0
    (root / "disk/old.txt").touch()
    (root / "model").symlink_to(root / "disk")
    assert merge(given(root, "--adapter-only", "--force")) == 0
    assert (root / "model").is_symlink()
    assert (root / "disk/manifest.json").is_file()
    assert not (root / "disk/old.txt").exists()
    assert left_by(root) == {"disk", "model"}


def test_force_replaces_an_export_once_the_new_one_is_whole(root, monkeypatch) -> None:
    assert merge(given(root, "--dtype", "fp32")) == 0
    before = (root / "model/model.safetensors").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(given(root, "--dtype", "bf16", "--force"))
    assert (root / "model/model.safetensors").read_bytes() == before
    assert left_by(root) == {"model"}
    assert merge(given(root, "--dtype", "bf16", "--force")) == 0
    assert (root / "model/model.safetensors").stat().st_size < 0.6 * len(before)
    assert left_by(root) == {"model"}


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_finished(root) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed_merge.py"))]
    command += given(root, "--max-shard-size", "50KB")
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert left_by(root) == {".model.part"}
    assert not (root / ".model.part/config.json").exists()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForImageTextToText.from_pretrained(root / ".model.part", local_files_only=True)
    assert merge(given(root)) == 0
    assert left_by(root) == {"model"}


def test_a_full_disk(root, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(directory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(UserError, match=r"--output needs 0\.0 GB, 0\.0 GB are free there"):
            merge(given(root))
    assert left_by(root) == set()


@pytest.mark.slow
def test_a_disk_that_fills_up_under_it(root) -> None:
    # A limit on the size of a file is what the kernel can be made to refuse a write by.
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import sys; from dehvf_ds.distributed import run_entry; from dehvf_ds.export.cli import main;"
        "sys.argv[0] = 'merge_adapters.py'; run_entry(main)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *given(root)],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert "model: not written: " in line
    assert "Traceback" not in found.stderr
    assert left_by(root) == set()


def test_a_folder_that_cannot_be_written(root) -> None:
    (root / "file").write_text("")
    with pytest.raises(UserError, match="not written: Not a directory"):
        merge(given(root, output="file/model"))


def drop_tensor(root: Path) -> None:
    """Leaves out a trained tensor, and hashes the rest as if it were whole."""
    path = root / "run/adapter/visual.safetensors"
    tensors = load_file(path)
    tensors.pop("reader.w_out")
    save_file(tensors, path)
    rehash(root, "visual.safetensors")


def empty_tensor(root: Path) -> None:
    path = root / "run/adapter/visual.safetensors"
    save_file(load_file(path) | {"reader.w_out": torch.empty(0)}, path)
    rehash(root, "visual.safetensors")


def rehash(root: Path, name: str) -> None:
    import hashlib

    file = root / "run/adapter/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = hashlib.sha256((root / "run/adapter" / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest))


def change_byte(root: Path) -> None:
    path = root / "run/adapter/lora/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_decoder(root: Path) -> None:
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(text_config(**DECODER)).save_pretrained(root / "llm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "run/adapter/visual.safetensors").unlink(), r"visual\.safetensors: missing"),
        (lambda root: (root / "run/adapter/manifest.json").unlink(), r"no manifest\.json"),
        (change_byte, r"adapter_model\.safetensors: changed since it was written"),
        (drop_tensor, r"tensors do not fit the model: \['reader\.w_out'\]"),
        (empty_tensor, r"reader\.w_out has shape \[0\]"),
        (other_decoder, r"differs from it in the weights of"),
        (lambda root: (root / "llm/model.safetensors").unlink(), r"llm: no weights found"),
        (
            lambda root: (root / "tower/preprocessor_config.json").unlink(),
            r"tower: no preprocessor_config\.json",
        ),
        (lambda root: (root / "llm/tokenizer.json").unlink(), r"no tokenizer at .*llm"),
        (lambda root: (root / "run").rename(root / "away"), r"run: no such directory"),
    ],
)
def test_what_is_missing_or_damaged_is_named(root, change, message) -> None:
    change(root)
    with pytest.raises(UserError, match=message):
        merge(given(root))
    assert left_by(root) <= {"away"}


def test_what_is_merged_is_not_merged_again(root) -> None:
    assert merge(given(root)) == 0
    with pytest.raises(UserError, match="is merged already"):
        merge(["--checkpoint", str(root / "model"), "--output", str(root / "again")])


def test_an_export_cut_short_is_named_before_it_loads(root) -> None:
    assert merge(given(root)) == 0
    path = root / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    from dehvf_ds.model import ModelError

    with pytest.raises(ModelError, match=r"model\.safetensors: \d+ bytes, not \d+; copy it again"):
        find_trained(root / "model").load()
    (root / "model" / EXPORT_FILE).write_text("[]")
    with pytest.raises(ModelError, match=r"export\.json: damaged \(.*\); copy it again"):
        find_trained(root / "model").load()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-shard-size", "five"], "--max-shard-size five"),
        (["--max-shard-size", "0KB"], "--max-shard-size 0KB"),
        (["--max-shard-size=-1GB"], "--max-shard-size -1GB"),
        (["--verify-rows", "0"], "--verify-rows must be at least 1"),
        (["--adapter-only", "--dtype", "bf16"], "--adapter-only copies what was trained"),
    ],
)
def test_flags_that_make_no_sense(root, capsys, more, message) -> None:
    with pytest.raises(SystemExit, match="2"):
        merge(given(root, *more))
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_in_the_middle_of_a_run(world, tmp_path) -> None:
    """What two ranks hold in parts is exported whole; the run's last checkpoint is its adapter."""
    run_ranks(REPOSITORY / "dehvf_ds/train.py", arguments(world, "export", "--train.save_every", "2"), 2)
    run = world / "runs/export"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*"))[-1] == "step_00000004"
    for name in ("checkpoints/step_00000002", "checkpoints/step_00000004", ""):
        output = tmp_path / (Path(name).name or "run")
        merge_command = ["--checkpoint", str(run / name), "--output", str(output)]
        found = start("tools/merge_adapters.py", merge_command)
        assert found.returncode == 0, found.stderr
    states = {path.name: load_file(path / "model.safetensors") for path in tmp_path.iterdir()}
    last, final, earlier = states["step_00000004"], states["run"], states["step_00000002"]
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(earlier[name], final[name]) for name in final)
    # A run without an end has no adapter of its own.
    (run / "adapter").rename(run / "adapter-away")
    try:
        with pytest.raises(
            UserError, match=r"the run has not ended; name one of its checkpoints, as .*step_00000004"
        ):
            merge(["--checkpoint", str(run), "--output", str(tmp_path / "none")])
    finally:
        (run / "adapter-away").rename(run / "adapter")


def test_an_adapter_is_copied_without_what_lies_beside_it(root) -> None:
    assert merge(given(root, output="run/adapter/merged")) == 0
    (root / "run/adapter/notes.txt").write_text("mine")
    assert merge(given(root, "--adapter-only", output="run/adapter/alone")) == 0
    found = {path.name for path in (root / "run/adapter/alone").rglob("*") if path.is_file()}
    trained = {"dehvf_config.json", "manifest.json", "visual.safetensors"}
    assert found == trained | {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_an_output_that_can_be_no_name(root) -> None:
    with pytest.raises(UserError, match=r"--output .*: File name too long"):
        merge(given(root, output="a" * 300))


def test_a_user_without_a_home(root, monkeypatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert merge(given(root)) == 0
