"""The plan as a user asks for it: what it prints, and every mistake in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import text_config, vision_config
from training.launch import REPOSITORY
from transformers import AutoModelForCausalLM

from dehvf_ds.config import UserError
from dehvf_ds.plan import main, split_flags
from dehvf_ds.training.planning.place import PlanConfig

RECIPE_13B = ["--config", "coco_llama13b", "--gpus-per-node", "8", "--nodes", "2", "--gpu", "H100-80G"]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert main(list(args)) == 0
    return capsys.readouterr().out.splitlines()


def values(lines: list[str], name: str) -> list[float]:
    """The numbers of the first row of that name."""
    line = next(line for line in lines if line.startswith(name))
    return [float(value.rstrip("%")) for value in line.removeprefix(name).split()]


def started(*args: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the entry by its path, from another folder; with its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, str(REPOSITORY / "dehvf_ds/plan.py"), *args]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    return result, time.perf_counter() - begin


def test_the_key_lines_of_13b_on_16_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *RECIPE_13B)
    assert lines[0] == "runs/coco_llama13b: 2 x 8 H100-80G, fusion ffn"
    assert lines[1] == (
        "parameters: LLM 13.016 B, tower 0.303 B frozen; trainable 4,585,088 (3,031,040 in LoRA)"
    )
    assert lines[2].startswith("step: 256 rows = 16 GPUs x 16 rows x 1 micro-steps; 64 tokens a row")
    for expected in (
        "                            ZeRO-3  ZeRO-3 + hpZ  ZeRO-3 + offload  ZeRO-2",
        "frozen LLM                    1.52          4.55              0.00   24.24",
        "frozen tower                  0.04          0.11              0.00    0.56",
        "gradient buckets              0.04          0.04              0.04    0.07",
        "activations                   8.63          8.63              8.63    8.24",
        "host of a node, loading      24.81         24.81             24.81    0.00",
        "checkpoint: 73 MB (fp32 masters, two moments, adapter)",
    ):
        assert expected in lines
    (recommended,) = (line for line in lines if line.startswith("recommended: "))
    assert recommended.startswith("recommended: ZeRO-2 (zero2.json): it gathers nothing")
    assert any(line.startswith("Assumed: MFU 0.5 of 989 TFLOP/s") for line in lines)


def test_an_evaluation_inside_the_run_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("evaluate" in line for line in printed(capsys, *RECIPE_13B))
    lines = printed(capsys, *RECIPE_13B, "--eval.every_steps", "9", "--eval.data", "nowhere")
    copy, while_it = values(lines, "whole copy to evaluate inside"), values(lines, "total while it evaluates")
    # 13.3 billion parameters in bf16 where every rank holds a part; under ZeRO-2 each has them all already.
    assert copy == [pytest.approx(13.32e9 * 2 / 2**30, rel=0.005)] * 3 + [0]
    zero3, zero2 = while_it[0], while_it[3]
    # All weights once, and less than 8 GiB of all else.
    assert copy[0] < zero2 < copy[0] + 8
    assert zero2 < zero3 < zero2 + 8


def test_a_micro_batch_that_does_not_divide_is_lowered_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *RECIPE_13B, "--train.micro_batch_size", "32")
    assert "planned with 16: start with --train.micro_batch_size 16" in lines[3]


def test_the_parts_sum_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *RECIPE_13B)
    start, end = (next(i for i, x in enumerate(lines) if x.startswith(n)) for n in ("frozen LLM", "total"))
    parts = [line for line in lines[start:end] if not line.startswith("  ")]
    columns = zip(*(map(float, line[27:].split()) for line in parts), strict=True)
    assert [sum(column) for column in columns] == pytest.approx(values(lines, "total"), abs=0.05)


def test_a_small_gpu_gets_sharding_and_a_tiny_one_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "coco_llama13b", "--gpu", "A100-40G"]
    lines = printed(capsys, *arguments, "--train.micro_batch_size", "16")
    (recommended,) = (line for line in lines if line.startswith("recommended: "))
    assert recommended.startswith("recommended: ZeRO-3 (zero3.json): it fits, and its gathers hide")
    lines = printed(capsys, *arguments, "--overhead-gib", "39")
    assert any(line.startswith("recommended: nothing fits; the least is ZeRO-3") for line in lines)


def test_slow_links_make_hpz_or_replicas_worth_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *RECIPE_13B, "--internode-gb-s", "1", "--overhead-gib", "50")
    (recommended,) = (line for line in lines if line.startswith("recommended: "))
    assert recommended.startswith("recommended: ZeRO-3 + hpZ (zero3_hpz.json)")


def hpz_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int | str, *args: str) -> list[str]:
    """The 13B plan with an hpZ file of its own, told from the shipped one by its bucket of 1.86 GiB."""
    zero = {"stage": 3, "zero_hpz_partition_size": size, "reduce_bucket_size": 1_000_000_000}
    content = {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    return printed(capsys, *RECIPE_13B, "--deepspeed", str(tmp_path / "ds.json"), *args)


def test_hpz_auto_is_a_node_and_zero3_on_a_single_one(tmp_path: Path, capsys) -> None:
    lines = hpz_plan(tmp_path, capsys, "auto")
    assert values(lines, "gradient buckets") == pytest.approx([0.04, 1.86, 0.04, 0.07])
    assert not any("zero_hpz_partition_size" in line for line in lines)
    lines = hpz_plan(tmp_path, capsys, "auto", "--nodes", "1")
    assert values(lines, "gradient buckets") == pytest.approx([1.86, 0.04, 0.04, 0.07])
    plain, hpz, *_ = values(lines, "frozen LLM")
    assert plain == hpz


def test_an_hpz_size_that_is_no_node_is_said(tmp_path: Path, capsys) -> None:
    lines = hpz_plan(tmp_path, capsys, 4)
    assert any("zero_hpz_partition_size 4 is planned as 8, auto's value here" in line for line in lines)
    lines = hpz_plan(tmp_path, capsys, 8, "--nodes", "1")
    assert any("zero_hpz_partition_size 8 is planned as 1, auto's value here" in line for line in lines)


def test_dashes_underscores_and_equal_signs() -> None:
    ours, others = split_flags(
        ["--gpus_per_node", "4", "--train.lr", "1", "--gpus-per-node=2", "--nodes=3", "--config", "demo"]
    )
    assert ours == ["--gpus_per_node", "4", "--gpus_per_node=2", "--nodes=3"]
    assert others == ["--train.lr", "1", "--config", "demo"]


def test_shapes_by_name_over_any_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--model.language_model", "llama-7b", "--model.vision_tower", "clip-vit-l14"]
    lines = printed(capsys, "--config", "coco_llama7b", *names)
    assert lines[1].startswith("parameters: LLM 6.738 B, tower 0.303 B frozen; trainable 5,156,224")
    lines = printed(capsys, "--model.vision_tower", "dinov2-s14", "--gpu", "cpu", "--gpus-per-node", "2")
    assert lines[1].startswith("parameters: LLM 0.135 B, tower 0.022 B frozen")
    assert "fp32" in lines[2]


def test_backbones_on_disk_are_counted_themselves(tmp_path: Path, capsys) -> None:
    from transformers import CLIPImageProcessorPil

    AutoModelForCausalLM.from_config(text_config()).save_pretrained(tmp_path / "llm")
    vision_config().save_pretrained(tmp_path / "tower")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(tmp_path / "tower")
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e9}})
    )
    paths = ["--model.language_model", str(tmp_path / "llm"), "--model.vision_tower", str(tmp_path / "tower")]
    small = ["--model.num_levels", "2", "--gpus-per-node", "2", "--tokens", "32"]
    lines = printed(capsys, *paths, *small, "--deepspeed", str(tmp_path / "ds.json"))
    assert not any("built-in sizes" in line for line in lines)
    assert any("32 tokens a row, 17 visual tokens a level, fp32" in line for line in lines)
    # The run's own JSON speaks for its stage, the shipped ones for the others.
    assert values(lines, "gradient buckets") == pytest.approx([0.07, 0.07, 0.07, 7.45])


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert any("┃" in line for line in printed(capsys, *RECIPE_13B))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "H1000"], "gpu"),
        (["--nodes", "0"], "--nodes is '0'; it should be"),
        (["--nodes", "two"], "nodes"),
        (["--mfu", "1.5"], "--mfu is '1.5'; it should be"),
        (["--gpus-per-node"], "gpus_per_node"),
        (["--no-such-flag", "1"], "no_such_flag"),
        (["--config", "no_such_recipe"], "no such file in "),
        (["--deepspeed", "no/such.json"], "--deepspeed no/such.json: no such file"),
        (["--gpus-per-node", "3"], "train.global_batch_size 16 is not a multiple of 3 GPUs"),
        (["--model.num_levels", "99"], "99 vision levels asked of a tower with 12 blocks"),
    ],
)
def test_a_mistake_is_one_message(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_is_one_line_and_code_2() -> None:
    result, _ = started("--gpu", "H1000")
    assert result.returncode == 2
    assert result.stdout == ""
    assert [line.startswith("error: ") for line in result.stderr.splitlines()] == [True]


def test_an_unknown_backbone_without_network_is_one_line() -> None:
    arguments = ["--model.language_model", "nobody/none", "--model.vision_tower", "clip-vit-l14"]
    result, _ = started(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: model: language model nobody/none: ")


@pytest.mark.slow
def test_a_plan_takes_seconds_without_gpu_and_network() -> None:
    result, seconds = started(*RECIPE_13B)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert seconds < 30


def test_defaults_are_said_in_the_help() -> None:
    result, _ = started("--help")
    assert result.returncode == 0
    for name in ("gpus_per_node", "nodes", "gpu", "mfu", "tokens", "internode_gb_s"):
        assert f"--{name}" in result.stdout
    assert PlanConfig().mfu == 0.5
