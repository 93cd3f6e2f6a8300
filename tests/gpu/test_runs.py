"""Whole runs of one rank in bf16, each a process: against plain torch, resumed, evaluated, exported.

On the CPU one run under ZeRO-2 rehearses them; the others differ from it by their flags alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu.runs import SAVED, STEPS, Runs
from tiny_entries import read_metrics

from dehvf_ds.config import parse_run_config
from dehvf_ds.data.examples import read_sample
from dehvf_ds.distributed import World
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.model.backbones import load_model
from dehvf_ds.training.engine import learning_rate, parameter_groups, set_learning_rate
from dehvf_ds.training.resolve import ResolvedRun, resolve

MIB = 2**20


@pytest.fixture(params=["zero2", "zero3"])
def stage(request: pytest.FixtureRequest, device: str) -> str:
    if (device, request.param) == ("cpu", "zero3"):
        pytest.skip("rehearsed with zero2")
    return request.param


def look_at(runs: Runs, name: str) -> ResolvedRun:
    """A run's files and settings, in this process."""
    return resolve(parse_run_config(runs.arguments(name)), World(0, 0, 1, 1, torch.device(runs.device)))


def plain_losses(run: ResolvedRun) -> list[float]:
    """The run's losses as nothing but torch has them, in fp32, from the run's own batches without workers."""
    config, device = run.config, run.world.device
    bases = (config.model.language_model, config.model.vision_tower)
    model = load_model(run.model_config, *bases, dtype=torch.float32, seed=config.seed).to(device).train()
    trainable = model.trainable_parameters()
    groups = parameter_groups(trainable, config.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.train.betas)
    batches = iter(run.training_batches(0, run.num_steps))
    losses = []
    for step in range(run.num_steps):
        window = [next(batches) for _ in range(config.train.accumulation(1))]
        divisor = max(1, sum(batch.num_supervised() for batch in window))
        set_learning_rate(optimizer.param_groups, learning_rate(step, config.train, run.num_steps))
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in window:
            loss = model(**batch.to(device).inputs()).loss_sum / divisor
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.train.max_grad_norm)
        optimizer.step()
    return losses


def test_a_bf16_run_has_the_losses_of_plain_torch_in_fp32(runs: Runs, stage: str, fact) -> None:
    losses = runs.losses(stage)[:STEPS]
    expected = plain_losses(look_at(runs, stage))
    worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    fact(f"losses {losses[0]:.3f} .. {losses[-1]:.3f}, at most {worst:.1e} off")
    assert losses == pytest.approx(expected, rel=1e-2)
    # The comparison is not of two models that stand still.
    assert max(expected) - min(expected) > 1e-2


def test_a_run_validates_and_evaluates_in_its_middle(runs: Runs, stage: str, fact) -> None:
    lines = runs.lines(stage)
    told = {line["step"]: line for line in lines}
    assert all(0 < told[step]["val/loss"] < 7 for step in (SAVED, STEPS))
    if stage == "zero2":
        assert all(0 <= told[step]["eval/accuracy"] <= 100 for step in (SAVED, STEPS))
        assert (runs.directory(stage) / f"samples/step_{STEPS:08d}.png").stat().st_size > 1000
    elif "eval/CIDEr" not in told[STEPS]:
        # Without the scorers the run says so and goes on.
        pytest.importorskip("pycocoevalcap", reason="captions were decoded, but pycocoevalcap is not there")
        raise AssertionError("no CIDEr, although pycocoevalcap is there")
    if runs.device == "cuda":
        assert all(line["memory_bytes"] > 0 and line["mfu"] is not None for line in lines)
    seconds = [line["seconds"] for line in lines]
    fact(f"first step {seconds[0]:.2f} s, others from {min(seconds[1:]):.3f} s")


def test_activation_checkpointing_changes_no_loss(runs: Runs, device: str, fact) -> None:
    if device == "cpu":
        pytest.skip("rehearsed with zero2")
    plain, recomputed = runs.losses("zero3"), runs.losses("zero3-checkpointing")
    fact("bit-equal" if plain == recomputed else f"losses {plain} and {recomputed}")
    assert recomputed == pytest.approx(plain, rel=3e-3)


def test_merged_in_bf16_says_what_the_run_says(runs: Runs, stage: str, tmp_path: Path, fact) -> None:
    from transformers import AutoModelForImageTextToText

    from dehvf_ds.evaluation.dataset import open_questions
    from dehvf_ds.export.__main__ import main as merge

    run_dir, run = runs.finished(stage), look_at(runs, stage)
    merged_dir = tmp_path / "merged"
    assert merge(["--checkpoint", str(run_dir), "--output", str(merged_dir), "--dtype", "bf16"]) in (0, None)
    model = find_trained(run_dir).load("bf16").to(runs.device)
    merged = AutoModelForImageTextToText.from_pretrained(merged_dir, dtype=torch.bfloat16).eval()
    merged = merged.to(runs.device)
    questions = open_questions(
        str(run.config.data.val),
        run.config.data.task,
        run.tokenizer,
        run.transform,
        prompt=run.model_config.prompt,
        scienceqa=run.config.data.scienceqa,
        max_new_tokens=8,
        max_samples=4,
    )
    answers = [questions.ask(one, [0, 1, 2, 3]) for one in (model, merged)]
    assert len(answers[0]) == len(answers[1]) == 4
    batch = questions.collator([read_sample(questions.index, row) for row in range(4)])
    given = batch.to(runs.device, torch.bfloat16).inputs()
    given.pop("labels")
    with torch.no_grad():
        logits, folded = (one(**given).logits.float().cpu()[:, -1] for one in (model, merged))
    off = ((folded - logits).norm() / logits.norm()).item()
    same = sum(a == b for a, b in zip(*answers, strict=True))
    fact(f"{same} of 4 answers the same, logits {off:.1e} off")
    assert off < 3e-2


def test_evaluation_in_a_process_of_its_own(runs: Runs, device: str, fact) -> None:
    if device == "cpu":
        pytest.skip("tests/test_entries.py runs it")
    run_dir = runs.finished("zero2")
    given = ["--task", "scienceqa", "--data", str(runs.world / "scienceqa"), "--batch_size", "5"]
    given += ["--model", str(run_dir), "--loss", "true", "--split", "alone", "--max_samples", "10"]
    runs.run("dehvf_ds/eval.py", given)
    metrics = read_metrics(run_dir / "eval/scienceqa-alone")
    fact(f"loss {metrics['loss']:.3f}, decoded in {metrics['decoding']['dtype']}")
    assert metrics["decoding"]["dtype"] == "bfloat16"
    assert 0 < metrics["loss"] < 7


def test_peak_memory_is_what_the_plan_says(runs: Runs, stage: str, fact) -> None:
    from dehvf_ds.planning.memory import step_bytes

    name = f"{stage}-bulky"
    measured = runs.lines(name)[-1]["memory_bytes"]
    run = look_at(runs, name)
    batches = list(run.training_batches(0, run.num_steps))
    longest = max(batches, key=lambda batch: batch.input_ids.numel())
    rows, tokens = longest.input_ids.shape
    # The allocator counts neither CUDA's context nor NCCL's buffers.
    predicted = sum(step_bytes(run.model_config, longest, run.ds_config).values())
    fact(
        f"measured {measured / MIB:.0f} MiB, planned {predicted / MIB:.0f}, of these activations of "
        f"{rows} x {tokens} tokens; planned / measured {predicted / measured:.2f}"
    )
    assert predicted > 0
    if runs.device == "cuda":
        assert 0.75 < predicted / measured < 1.33


# Last: it writes into runs that the others read.
def test_a_resumed_run_is_the_run_that_never_stopped(runs: Runs, stage: str, fact) -> None:
    whole, again = runs.resumed(stage)
    assert [line["step"] for line in again] == list(range(1, STEPS + 1))
    assert again[:SAVED] == whole[:SAVED]
    assert [line["rows_crc"] for line in again] == [line["rows_crc"] for line in whole]
    losses, expected = ([line["train/loss"] for line in lines] for lines in (again, whole))
    worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    fact("bit-equal" if losses == expected else f"losses at most {worst:.1e} off")
    # Not bit for bit on a GPU: its attention adds gradients in an order of its own.
    assert losses == (expected if runs.device == "cpu" else pytest.approx(expected, rel=2e-3))
