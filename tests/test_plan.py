"""The plan as a user asks for it: what it prints, and every mistake in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY
from tiny_models import text_config, vision_config
from transformers import CLIPImageProcessorPil

from dehvf_ds.config import UserError
from dehvf_ds.plan import main

SMALL = ["--model.num_feature_layers", "2", "--gpus-per-node", "2", "--tokens", "32"]


def values(lines: list[str], name: str) -> list[float]:
    """The numbers of the first row of that name."""
    line = next(line for line in lines if line.startswith(name))
    return [float(value.rstrip("%")) for value in line.removeprefix(name).split()]


def recommended(lines: list[str]) -> str:
    (line,) = (line for line in lines if line.startswith("recommended: "))
    return line.removeprefix("recommended: ")


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Plans for tiny backbones on disk, with a DeepSpeed JSON of the test's own."""
    text_config().save_pretrained(tmp_path / "llm")
    vision_config().save_pretrained(tmp_path / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(tmp_path / "tower")
    paths = ["--model.language_model", str(tmp_path / "llm"), "--model.vision_tower", str(tmp_path / "tower")]

    def run(*args: str, **zero: object) -> list[str]:
        given = {"zero_optimization": {"stage": 2} | zero}
        (tmp_path / "ds.json").write_text(json.dumps(given))
        assert main([*paths, *SMALL, "--deepspeed", str(tmp_path / "ds.json"), *args]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.slow
def test_a_plan_of_13b_on_16_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = ["--eval.every_steps", "9", "--eval.data", "nowhere"]
    assert main(["--config", "coco_llama13b", "--nodes", "2", *evaluation]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/coco_llama13b: 2 x 8 H100-80G, fusion ffn"
    assert lines[1] == (
        "parameters: LLM 13.016 B, tower 0.303 B frozen; trainable 4,585,088 (3,031,040 in LoRA)"
    )
    assert lines[2].startswith("step: 256 rows = 16 GPUs x 16 rows x 1 micro-steps; 64 tokens a row")
    for name, expected in {
        "frozen LLM": [1.52, 4.55, 0.00, 24.24],
        "frozen tower": [0.04, 0.11, 0.00, 0.56],
        "gradient buckets": [0.04, 0.04, 0.04, 0.07],
        # 8.63 and 8.24 by formulas that a GPU's peak agreed with to 2 %.
        "activations ": [8.63, 8.63, 8.63, 8.24],
        "full model for evaluation": [24.82, 24.82, 24.82, 0.00],
        "host of a node, pinned": [0.00, 0.00, 12.40, 0.00],
    }.items():
        assert values(lines, name) == pytest.approx(expected, abs=0.02)
    # All weights once, and less than 8 GiB of all else.
    zero3, _, _, zero2 = values(lines, "total while it evaluates")
    assert 24.82 < zero2 < zero3 < 24.82 + 8
    assert "checkpoint: 73 MB (fp32 masters, two moments, adapter)" in lines
    assert recommended(lines).startswith("ZeRO-2 (zero2.json): it gathers nothing")
    start, end = (next(i for i, x in enumerate(lines) if x.startswith(n)) for n in ("frozen LLM", "total"))
    parts = [values([line], line[:27]) for line in lines[start:end]]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(
        values(lines, "total"), abs=0.05
    )


def test_the_runs_own_json_speaks_for_its_stage_and_the_shipped_ones_for_the_others(printed) -> None:
    lines = printed(reduce_bucket_size=1_000_000_000)
    assert not any("built-in sizes" in line or "evaluates" in line for line in lines)
    assert any("32 tokens a row, 17 visual tokens a feature layer, fp32" in line for line in lines)
    assert values(lines, "gradient buckets") == pytest.approx([0.07, 0.07, 0.07, 3.73])
    assert recommended(printed("--overhead-gib", "79")).startswith("nothing fits; the least is ZeRO-")
    # A bucket that only ZeRO-3's own JSON keeps small enough.
    assert recommended(printed(reduce_bucket_size=30_000_000_000)).startswith("ZeRO-3")


def test_what_is_planned_otherwise_than_set_is_said(printed) -> None:
    lines = printed("--train.global_batch_size", "16", "--train.micro_batch_size", "16")
    assert any("planned with 8: start with --train.micro_batch_size 8" in line for line in lines)
    together = ["--data.captions_together", "4", "--train.global_batch_size", "24", "--gpus-per-node", "2"]
    lines = printed(*together, "--train.micro_batch_size", "8")
    assert any("planned with 4: start with --train.micro_batch_size 4" in line for line in lines)
    assert any("time is planned with 0.4 tower passes a row" in line for line in lines)
    for size, said in (("auto", False), (2, False), (4, True)):
        lines = printed("--nodes", "2", stage=3, zero_hpz_partition_size=size, reduce_bucket_size=10**9)
        assert values(lines, "gradient buckets") == pytest.approx([0.07, 3.73, 0.07, 0.15], abs=0.01)
        assert said == any("size 4 is planned as 2, auto's value here" in line for line in lines)


def test_known_names_need_no_files_and_a_terminal_gets_a_table(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    names = ["--model.language_model", "smollm2-135m", "--model.vision_tower", "dinov2-s14"]
    assert main([*names, "--gpu=cpu", "--gpus_per_node", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("parameters: LLM 0.135 B, tower 0.022 B frozen")
    assert "fp32" in lines[2]
    assert any("┃" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "H1000"], "--gpu is 'H1000'; it should be 'H100-80G'"),
        (["--gpus-per-node"], "gpus_per_node"),
        (["--no-such-flag", "1"], "no_such_flag"),
        (["--gpus-per-node", "3"], "train.global_batch_size 16 is not a multiple of 3 GPUs"),
        (
            ["--data.captions_together", "8", "--train.global_batch_size", "24"],
            "over 8 GPUs is not a multiple of",
        ),
        (["--model.num_feature_layers", "99"], "99 feature layers do not fit a tower with 12 blocks"),
    ],
)
def test_a_mistake_is_one_message(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_backbone_without_network_is_one_line_and_code_2() -> None:
    arguments = ["--model.language_model", "nobody/none", "--model.vision_tower", "clip-vit-l14"]
    command = [sys.executable, str(REPOSITORY / "dehvf_ds/plan.py"), *arguments]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: model: language model nobody/none: ")
