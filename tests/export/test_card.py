"""The model card: what the hub reads of it, what people read, and what it must not tell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_artifacts import build_bases, save, trained_model

from dehvf_ds.export.card import Form, model_card, stated_licence
from dehvf_ds.model.adapter import find_trained

COCO = {"BLEU-4": 31.25, "CIDEr": 101.5, "loss": 2.5, "num_samples": 80, "decoding": {"num_beams": 3}}
COCO |= {"protocol": {"tokenizer": "PTB", "references": {"sha256": "0"}}}
LLAMA = "---\nlicense: other\nlicense_name: llama2\nlicense_link: https://a.org/l\n---\nText"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    bases = build_bases(tmp_path)
    model = trained_model(bases, task="caption", prompt='Say "what"\nis | there:')
    save(model, bases, tmp_path / "run/adapter")
    (tmp_path / "run/config.yaml").write_text(
        f"run_dir: {tmp_path}/run\n"
        f"model: {{language_model: {tmp_path}/llm, vision_tower: {tmp_path}/tower}}\n"
        f"data: {{train: {tmp_path}/coco/train}}\n"
        "train: {steps: 4, global_batch_size: 8, micro_batch_size: 2}\n"
    )
    return tmp_path / "run"


def card(run: Path, form: Form = "merged") -> ModelCard:
    return ModelCard(model_card(find_trained(run), run, form=form, dtype=torch.bfloat16))


def score(run: Path, name: str, metrics: str) -> None:
    (run / "eval" / name).mkdir(parents=True)
    (run / "eval" / name / "metrics.json").write_text(metrics)


def test_the_hub_reads_its_front_matter(run) -> None:
    data = card(run).data
    found = (data.library_name, data.pipeline_tag, data.license, data.tags)
    assert found == ("transformers", "image-text-to-text", "other", ["dehvf", "vision-language", "caption"])
    assert data.base_model is None  # directories are no names on a hub
    file = run / "adapter/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["bases"]["language_model"]["path"] = "some/llama"
    manifest["bases"]["vision_tower"]["path"] = "other/tower"
    file.write_text(json.dumps(manifest))
    trained = find_trained(run, str(run.parent / "llm"), str(run.parent / "tower"))
    for form, relation, library in (
        ("merged", "finetune", "transformers"),
        ("adapter", "adapter", "dehvf_ds"),
    ):
        found = ModelCard(model_card(trained, run, form=form, dtype=None))
        assert found.data.base_model == ["some/llama", "other/tower"]
        assert (found.data.base_model_relation, found.data.library_name) == (relation, library)
        assert "language model: some/llama" in found.text


@pytest.mark.parametrize("form", ["merged", "unfolded", "adapter"])
def test_its_code_is_python_and_it_holds_no_path_of_this_machine(run, form) -> None:
    text = card(run, form).text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "card", "exec")
    assert str(run.parent) not in text
    assert ("peft" in text) == (form != "merged")
    if form != "adapter":
        assert repr('Say "what"\nis | there:') in blocks[0]


def test_settings_and_scores_and_damaged_ones(run) -> None:
    for number, metrics in enumerate(["not JSON", "[]", "{}", '{"accuracy": 3}']):
        score(run, f"caption-{number}", metrics)
    assert "None came with the checkpoint." in card(run).text
    assert "step: 7" in model_card(find_trained(run), None, form="adapter", dtype=None)
    score(run, "caption-test", json.dumps(COCO))
    score(run, "scienceqa-test", '{"accuracy": {"NAT": 40.0, "Avg": 44.2568}, "num_samples": 296}')
    text = card(run).text
    for line in ("data: coco/train", "batch size: 8", "step: 7"):
        assert f"\n- {line}\n" in text
    assert "\nProtocol: tokenizer PTB; num_beams 3.\n" in text
    assert "\n\n| BLEU-4 | CIDEr |\n| --- | --- |\n| 31.25 | 101.50 |\n\n" in text
    assert "\n\n| NAT | Avg |\n| --- | --- |\n| 40.00 | 44.26 |\n\n" in text
    assert "\n\n**caption-test**, 80 samples\n\n" in text
    count = sum(p.numel() for p in find_trained(run).load().trainable_parameters().values())
    assert f"\n- trained parameters: {count:,}; all others are frozen\n" in text


@pytest.mark.parametrize(
    ("readme", "source", "wanted"),
    [
        ("no front matter", "broken", {}),
        (LLAMA, "", {"license": "other", "license_name": "llama2", "license_link": "https://a.org/l"}),
        ("---\n: [broken\n---\n", '{"license": "Apache-2.0"}', {"license": "apache-2.0"}),
        ("---\nlicense: [a, b]\n---\n", "[]", {}),
    ],
)
def test_what_a_base_states_of_its_licence(run, readme, source, wanted) -> None:
    (run.parent / "llm/README.md").write_text(readme)
    (run.parent / "llm/source.json").write_text(source)
    assert stated_licence(str(run.parent / "llm")) == wanted
    if "license_name" in wanted:
        found = card(run)
        assert found.data.license_name == "llama2"
        assert "\n- language model: llm; licence: llama2 (https://a.org/l)\n- vision tower: " in found.text
