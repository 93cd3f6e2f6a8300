"""The model card: what the hub reads of it, what people read, and what it must not tell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_artifacts import build_bases, save, trained_model

from dehvf_ds.export.card import Form, collect_facts, model_card
from dehvf_ds.export.licences import copy_licence_files, stated_licence
from dehvf_ds.model.weights import find_trained

COCO = {
    "BLEU-4": 31.25,
    "CIDEr": 101.5,
    "loss": 2.5,
    "num_samples": 80,
    "protocol": {"tokenizer": "PTB", "references": {"sha256": "0"}},
    "decoding": {"num_beams": 3},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    bases = build_bases(tmp_path)
    save(
        trained_model(bases, task="caption", prompt='Say "what"\nis | there:'),
        bases,
        tmp_path / "run/adapter",
    )
    (tmp_path / "run/config.yaml").write_text(
        f"run_dir: {tmp_path}/run\n"
        f"model: {{language_model: {tmp_path}/llm, vision_tower: {tmp_path}/tower}}\n"
        f"data: {{train: {tmp_path}/coco/train}}\n"
        "train: {steps: 4, global_batch_size: 8, micro_batch_size: 2}\n"
    )
    return tmp_path / "run"


def card(run: Path, form: Form = "merged", dtype: torch.dtype | None = torch.bfloat16) -> str:
    return model_card(collect_facts(find_trained(run), run, dtype=dtype, form=form))


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def score(run: Path, name: str, metrics: Any) -> None:
    directory = run / "eval" / name
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))


def test_the_hub_reads_its_front_matter(run) -> None:
    matter = front_matter(card(run))
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "image-text-to-text"
    assert matter["license"] == "other"
    assert {"dehvf", "caption"} <= set(matter["tags"])
    assert "base_model" not in matter  # directories are no names on a hub
    assert front_matter(card(run, "adapter", None))["library_name"] == "dehvf_ds"


def test_bases_on_a_hub_are_named(run) -> None:
    file = run / "adapter/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["bases"]["language_model"]["path"] = "some/llama"
    manifest["bases"]["vision_tower"]["path"] = "other/tower"
    file.write_text(json.dumps(manifest))
    root = run.parent
    trained = find_trained(run, str(root / "llm"), str(root / "tower"))
    for form, relation in (("merged", "finetune"), ("adapter", "adapter")):
        text = model_card(collect_facts(trained, run, dtype=None, form=form))
        assert front_matter(text)["base_model"] == ["some/llama", "other/tower"]
        assert front_matter(text)["base_model_relation"] == relation
        assert "language model: some/llama" in text


@pytest.mark.parametrize("form", ["merged", "unfolded", "adapter"])
def test_its_code_is_python_and_its_paths_are_nobodys(run, form) -> None:
    text = card(run, form)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "card", "exec")
    assert str(run.parent) not in text
    assert "/tmp" not in text
    assert ("peft" in text) == (form != "merged")
    if form != "adapter":
        assert repr('Say "what"\nis | there:') in blocks[0]


def test_settings_and_scores(run) -> None:
    score(run, "coco-test", COCO)
    text = card(run)
    assert "data: coco/train" in text
    assert "batch size: 8" in text
    assert "step: 7" in text
    assert "| BLEU-4 | CIDEr |\n| --- | --- |\n| 31.25 | 101.50 |" in text
    assert "**coco-test**, 80 samples" in text
    assert "Protocol: tokenizer PTB; num_beams 3." in text
    count = sum(p.numel() for p in find_trained(run).load().trainable_parameters().values())
    assert f"trained parameters: {count:,}" in text


def test_questions_scored_by_subject(run) -> None:
    score(run, "scienceqa-test", {"accuracy": {"NAT": 40.0, "Avg": 44.2568}, "num_samples": 296})
    assert "| NAT | Avg |\n| --- | --- |\n| 40.00 | 44.26 |" in card(run)


@pytest.mark.parametrize("metrics", ["not JSON", "[]", "{}", '{"accuracy": 3}'])
def test_damaged_scores_do_not_stop_an_export(run, metrics) -> None:
    score(run, "coco-x|y", metrics)
    assert "## Evaluation" in card(run)


def test_an_adapter_without_its_run_has_a_card(run) -> None:
    (run / "config.yaml").unlink()
    trained = find_trained(run)
    text = model_card(collect_facts(trained, None, dtype=None, form="adapter"))
    assert "None came with the checkpoint." in text
    assert "step: 7" in text


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, {}),
        ({"README.md": "no front matter"}, {}),
        ({"README.md": "---\nlicense: MIT\n---\n"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\n---\nText"},
            {"license": "other", "license_name": "llama2", "license_link": "LICENSE.txt"},
        ),
        ({"README.md": "---\n: [broken\n---\n"}, {}),
        (
            {"README.md": "---\n- a list\n---\n", "source.json": '{"license": "Apache-2.0"}'},
            {"license": "apache-2.0"},
        ),
        ({"source.json": "broken"}, {}),
        ({"README.md": "---\nlicense: [a, b]\n---\n"}, {}),
    ],
)
def test_what_a_base_states_of_its_licence(tmp_path, files, wanted) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stated_licence(str(tmp_path)) == wanted


def test_a_base_that_is_not_here_states_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert stated_licence("nobody/nothing") == {}
    assert copy_licence_files("nobody/nothing", tmp_path / "x") == []
    assert not (tmp_path / "x").exists()


def test_licence_files_go_along(tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("LICENSE", "Notice.txt", "USE_POLICY.md", "config.json", "README.md"):
        (base / name).write_text(name)
    (base / "licenses").mkdir()
    assert copy_licence_files(str(base), tmp_path / "copy") == ["LICENSE", "Notice.txt", "USE_POLICY.md"]
    assert (tmp_path / "copy/Notice.txt").read_text() == "Notice.txt"


def test_a_licence_reaches_the_card(run) -> None:
    (run.parent / "llm/README.md").write_text(
        "---\nlicense: other\nlicense_name: llama2\nlicense_link: https://example.org/l\n---\n"
    )
    text = card(run)
    assert front_matter(text)["license_name"] == "llama2"
    assert "licence: llama2 (https://example.org/l)" in text
    assert "vision tower: tower; licence: not stated in its directory" in text
