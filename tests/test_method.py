"""The harness of the comparison, `benchmarks/method`: what it measures and which runs come next."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import REPOSITORY
from tiny_models import build_model
from tiny_steps import rows
from torch import nn

from dehvf_ds.model.ffn import MemoryReader

METHOD = REPOSITORY / "benchmarks/method"


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its modules import each other by bare names, as scripts of one directory do."""
    monkeypatch.syspath_prepend(str(METHOD))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and Path(str(sys.modules[name].__file__)).parent == METHOD
        ):
            del sys.modules[name]


def test_words_right_counts_each_kind_apart() -> None:
    from tasks import words_right

    truth = "a large striped red circle to the left of a small blue star on a white background."
    assert words_right([(truth, truth)]) == {
        "color": 1, "texture": 1, "shape": 1, "size": 1, "background": 1, "count": 1, "relation": 1,
    }  # fmt: skip
    said = "A large dotted red circle above a blue star on a white background."
    found = words_right([(said, truth)])
    assert found == pytest.approx(
        {"color": 1, "texture": 0, "shape": 1, "size": 2 / 3, "background": 1, "count": 1, "relation": 0}
    )
    # A color that is said twice is right once; no object at all is a wrong count.
    assert words_right([("red red", "a red circle")])["color"] == pytest.approx(2 / 3)
    assert words_right([("nothing", "a red circle")])["count"] == 0
    # Nothing to tell: neither right nor wrong.
    assert words_right([("a circle", "a circle")])["relation"] == 0


def args_for(results: Path, **settings: Any) -> argparse.Namespace:
    standard = {"task": "scenes", "arms": ["ffn"], "rates": (1e-3, 2e-3, 4e-3), "seeds": (1, 2), "steps": 9}
    standard |= {"rows": 16, "device": "cpu"}
    return argparse.Namespace(**standard | {"output": results} | settings)


@pytest.mark.parametrize("best", [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
def test_the_grid_goes_on_until_the_best_rate_lies_inside(tmp_path: Path, best: float) -> None:
    from sweep import jobs

    ran = []
    for _ in range(20):
        waiting = list(jobs(args_for(tmp_path)))
        if not waiting:
            break
        job = waiting[0]
        ran.append(job)
        loss = abs(math.log2(job.lr / best))
        job.path(tmp_path).write_text(json.dumps({"loss": loss}))
    tuned = sorted(job.lr for job in ran if job.split == "val")
    assert {1e-3, 2e-3, 4e-3} <= set(tuned)
    assert tuned[0] < best < tuned[-1]
    tested = [job for job in ran if job.split == "test"]
    assert [(job.seed, job.lr) for job in tested] == [(1, pytest.approx(best)), (2, pytest.approx(best))]
    assert all(job.seed == 0 for job in ran if job.split == "val")


def test_one_rate_is_not_tuned(tmp_path: Path) -> None:
    from sweep import jobs

    args = args_for(tmp_path, rates=[2e-3], seeds=[])
    (job,) = jobs(args)
    job.path(tmp_path).write_text(json.dumps({"loss": 1.0}))
    assert list(jobs(args)) == []


def run_of(arm: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    head = {"task": "flickr8k", "arm": arm, "steps": 9, "lr": 1e-3, "seed": seed, "split": "test"}
    head |= {"rows": 2, "device": "cpu"}
    return head | {"trained": 10, "step_cpu_s": 1.0, "loss": loss, "losses": [1.0]} | more


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    from report import differences, gather, means

    for arm, worse in (("ffn", 0.0), ("lora", 0.5)):
        for seed in (1, 2, 3):
            run = run_of(arm, seed, seed + worse, CIDEr=50.0 - 10 * worse * seed, answers=["left out"])
            (tmp_path / f"{arm}{seed}.json").write_text(json.dumps(run))
    gather(tmp_path, tmp_path / "kept.jsonl")
    gather(tmp_path, tmp_path / "kept.jsonl")
    runs = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(runs) == 6
    assert not any("answers" in run for run in runs)
    # The seeds differ by far more than the arms do; within a seed they always differ alike.
    *_, row = differences(("loss", "CIDEr"), runs)
    assert row == "| lora | 9 x 2 | **-0.500 ± 0.000** | -10.0 ± 5.0 |"
    *_, row = means(("loss", "CIDEr"), runs)
    assert row == "| lora | 9 x 2 | 3 | 0.001 | 0.00 M | 9 | 2.500 ± 1.000 | 40.0 ± 5.0 |"


def test_arms_name_what_exists() -> None:
    from arms import ARMS, read_arm
    from variants import VARIANTS

    names = sorted(path.stem for path in ARMS.glob("*.yaml"))
    assert {"ffn", "memvp", "lora", "prefix64"} <= set(names)
    for name in names:
        arm = read_arm(name)
        assert arm.variants.keys() <= VARIANTS.keys(), name
        assert arm.about == yaml.safe_load((ARMS / f"{name}.yaml").read_text())["about"]


@pytest.mark.parametrize("kind", ["PartedReader", "HeadsReader", "SlotsReader", "MixedReader"])
def test_a_reader_in_parts_reads_as_the_products(kind: str) -> None:
    import variants

    torch.manual_seed(0)
    reader = MemoryReader(12, 5, 8)
    reader.w_out.data.normal_()
    reader.value_positions.data.normal_()
    x, memory, scales = torch.randn(2, 3, 12), torch.randn(2, 5, 8), torch.rand(2, 8) * 4
    wanted = reader(x, memory, *scales)
    reader.__class__ = getattr(variants, kind)
    scale_in, scale_out = scales
    settings = {"heads": 1, "levels": 1, "token_keys": None, "first_of": {id(scale_in): 0}}
    for name, value in settings.items():
        setattr(reader, name, value)
    reader.mixes = nn.ParameterList([torch.randn(8, 2), torch.zeros(2, 8)] * 2)
    torch.testing.assert_close(reader(x, memory, scale_in, scale_out), wanted)


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_a_played_tower_shows_what_the_tower_saw(fusion: str) -> None:
    from tower import PlayedTower, States

    from dehvf_ds.model.features import hidden_states

    model = build_model(fusion=fusion, trained=True, feature_layers=[1, 2])
    batch = rows(5, 7, 6)
    with torch.no_grad():
        seen = torch.stack(hidden_states(model.vision_tower, batch.pixel_values)[1:], dim=1)
        wanted = model(**batch.inputs()).loss
        states = States.__new__(States)
        states._all = torch.cat([torch.zeros_like(seen), seen])
        tower = model.vision_tower = PlayedTower(model.config)
        tower.play(states, [3, 4, 5], "cpu")
        found = model(**batch.inputs() | {"pixel_values": torch.zeros_like(batch.pixel_values)}).loss
        # Of all others it says nothing, rather than something else.
        unread = set(range(1, 5)) - tower.layers
        assert unread
        assert all(tower(batch.pixel_values).hidden_states[layer].isnan().all() for layer in unread)
    torch.testing.assert_close(found, wanted)


def test_gathered_answers_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    asked = []

    def score(split: str, answers: list[str]) -> dict[str, Any]:
        asked.append((split, answers))
        return {"CIDEr": 7.0}

    monkeypatch.setattr(report, "Split", lambda task, name, seed: f"{task.name} {name} {seed}")
    monkeypatch.setitem(report.TASKS, "flickr8k", replace(report.TASKS["flickr8k"], score=score))
    for seed, scores in ((1, {}), (2, {"CIDEr": 5.0})):
        run = run_of("ffn", seed, 1.0, answers=["a dog"], **scores)
        (tmp_path / f"{seed}.json").write_text(json.dumps(run))
    for _ in range(2):
        report.gather(tmp_path, tmp_path / "kept.jsonl")
        runs = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        assert [run["CIDEr"] for run in runs] == [7.0, 5.0]
    assert asked == [("flickr8k test 1", ["a dog"])]
