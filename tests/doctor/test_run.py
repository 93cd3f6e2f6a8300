"""A recipe that is ready, and recipes that lack one thing each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_models import text_config, vision_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.doctor import __main__ as entry
from dehvf_ds.doctor import run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Tiny backbones, a shard of scenes and a recipe that names them."""
    from dehvf_ds.data.building.__main__ import main as build_shards
    from dehvf_ds.demo.make_scenes import main as make_scenes

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
    monkeypatch.setattr(entry, "environment_checks", lambda: iter(()))
    code = entry.main(["--config", str(world / "recipe.yaml")])
    return code, {line[6:24].strip(): line for line in capsys.readouterr().out.splitlines()}


def test_a_recipe_that_is_ready(world: Path, capsys, monkeypatch, set_free_space) -> None:
    set_free_space(1 << 40)
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
def test_a_missing_path_fails_alone(
    world: Path, capsys, monkeypatch, set_free_space, name, what, found
) -> None:
    set_free_space(1 << 40)
    code, lines = recipe_lines(world, capsys, monkeypatch, **{name: "/nowhere/x"})
    assert code == 1
    assert [key for key, line in lines.items() if not line.startswith("ok")] == [what]
    assert lines[what].startswith("FAIL")
    assert found in lines[what]


def test_a_recipe_that_cannot_be_read_is_the_last_line(world: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(entry, "environment_checks", lambda: iter(()))
    assert entry.main(["--config", "no-such-recipe"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  recipe")
    assert "no such file in " in line


def test_a_backbone_without_weights_fails(tmp_path: Path) -> None:
    text_config().save_pretrained(tmp_path)
    line = run.check_backbone("language model", str(tmp_path))
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
    assert run.check_backbone("language model", "owner/some-7b").level == level


def test_a_run_directory_that_cannot_be_written_fails(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in run.check_run_dir(str(tmp_path / "file" / "run")).found
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = run.check_run_dir(str(tmp_path / "a" / "b"))
    assert line.level == "FAIL"
    assert line.found == f"{tmp_path}: not writable"


def test_a_full_disk_for_the_run_is_a_warning(tmp_path: Path, set_free_space) -> None:
    set_free_space(100 << 20)
    assert run.check_run_dir(str(tmp_path)).level == "warn"
