"""A finished run without its artifact gets it when it is started again; what a run needs is not removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_entries import arguments

from dehvf_ds import train
from dehvf_ds.atomic import part_of
from dehvf_ds.config import UserError, parse_run_config
from dehvf_ds.training import trainer
from dehvf_ds.training.run_dir import choose_start, open_run_dir


@pytest.fixture(scope="module")
def finished(world: Path) -> tuple[Path, list[str]]:
    """A run of one process that came to its end, and how it was started."""
    more = ["--data.num_workers", "0", "--train.steps", "2", "--train.save_every", "1"]
    given = arguments(world, "finished", *more)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, "1" if name.endswith("SIZE") else "0")
        assert train.main(given) == 0
    return world / "runs/finished", given


def cut(adapter: Path) -> None:
    path = adapter / "visual.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def older(adapter: Path) -> None:
    path = adapter / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 1}))


def half(adapter: Path) -> None:
    (adapter / "manifest.json").unlink()
    adapter.rename(part_of(adapter))


@pytest.mark.parametrize("harm", [cut, older, half])
def test_a_finished_run_gets_its_artifact_back(finished, monkeypatch, capsys, harm: Callable) -> None:
    run, given = finished
    adapter = run / "adapter"
    whole = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    harm(adapter)
    monkeypatch.setattr(trainer, "build_engine", None)  # no model is loaded for it
    assert train.main(given) == 0
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == whole
    assert not part_of(adapter).exists()
    printed = capsys.readouterr().out
    assert "finished already, all 2 steps" in printed
    assert f"adapter: {adapter}" in printed
    assert train.main(given) == 0
    assert f"adapter: {adapter}" not in capsys.readouterr().out


def test_a_finished_run_that_kept_no_checkpoint_is_told_so(world, finished, monkeypatch, capsys) -> None:
    run = world / "runs/no-checkpoint"
    given = [*finished[1], "--run_dir", str(run), "--train.save_every", "0"]
    assert train.main(given) == 0
    monkeypatch.setattr(trainer, "build_engine", None)  # no model is loaded for it
    capsys.readouterr()
    for more in ([], ["--train.log_every", "3"], ["--dry-run"]):
        assert train.main([*given, *more]) == 0
        line = f"{run}: finished already, all 2 steps; --overwrite true trains anew\n"
        assert capsys.readouterr().out == line
    # Another run, one whose end is not on record, and one whose weights are gone are kept as they are.
    for more in (["--train.lr", "1e-5"], ["--resume", "never"], ["--train.steps", "3"]):
        with pytest.raises(UserError, match="holds a run"):
            train.main([*given, *more])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="holds a run"):
        train.main(given)


def test_a_validation_that_fails_at_the_end_leaves_what_was_trained(world, finished, monkeypatch) -> None:
    def damaged(*_) -> float:
        raise UserError("a row of data.val is damaged")

    monkeypatch.setattr(trainer, "validation_loss", damaged)
    run = world / "runs/unvalidated"
    given = [*finished[1], "--run_dir", str(run), "--data.val", str(world / "test")]
    given += ["--train.save_every", "0"]
    with pytest.raises(UserError, match="is damaged"):
        train.main(given)
    for name in ("visual.safetensors", "manifest.json"):
        assert (run / "adapter" / name).read_bytes() == (finished[0] / "adapter" / name).read_bytes()


def test_overwrite_leaves_alone_what_the_run_needs(finished, tmp_path: Path) -> None:
    run, given = finished
    moved = shutil.copytree(run, tmp_path / "run")
    given = [*given, "--run_dir", str(moved), "--overwrite"]
    link = tmp_path / "link"
    link.symlink_to(moved)
    for more, message in (
        (["--init_from", str(moved)], "would remove init_from"),
        (["--init_from", str(link / "checkpoints/step_00000002")], "would remove init_from"),
        (["--model.language_model", str(link / "merged")], "would remove model.language_model"),
        (["--data.val", str(moved / "merged/data")], "would remove data.val"),
        (["--data.train", str(moved / "merged/data")], "would remove data.train"),
        (["--resume", str(moved / "checkpoints/step_00000002")], "give one of them"),
    ):
        (moved / "merged").mkdir(exist_ok=True)
        before = sorted(moved.rglob("*"))
        config = parse_run_config([*given, *more])
        for start in (open_run_dir, choose_start):
            with pytest.raises(UserError, match=message):
                start(config, "digest")
        assert sorted(moved.rglob("*")) == before


def test_overwrite_empties_no_directory_that_is_no_run(finished, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    config = parse_run_config([*finished[1], "--run_dir", str(tmp_path), "--overwrite"])
    for other in (None, "theme: dark\n"):
        if other is not None:
            (tmp_path / "config.yaml").write_text(other)
        with pytest.raises(UserError, match=r"holds samples and no run's config\.yaml"):
            open_run_dir(config, "digest")
    assert (tmp_path / "samples").exists()
