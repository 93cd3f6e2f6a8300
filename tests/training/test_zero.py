"""DeepSpeed over two ranks against one plain PyTorch process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_models import text_config, vision_config
from training.zero_worker import make_rows, run_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.model.backbones import load_model
from dehvf_ds.training.engine import build_model_config, learning_rate, parameter_groups, set_learning_rate

WORKER = Path(__file__).parent / "zero_worker.py"
STEPS = 20


@pytest.fixture
def job(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(tmp_path / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(tmp_path / "tower")
    return tmp_path


def run_deepspeed(job: Path, case: dict, stage: int, *, bf16: bool = False) -> tuple[dict, dict]:
    """Losses and trained tensors of a DeepSpeed job. Threshold 0 partitions every parameter."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
    (job / "ds.json").write_text(json.dumps({"zero_optimization": zero, **precision}))
    run_ranks(WORKER, [str(job), json.dumps(case)], 2)
    return json.loads((job / "result.json").read_text()), torch.load(job / "trained.pt")


def run_plain(job: Path, case: dict) -> tuple[list[float], dict]:
    """The reference: one process, whole batches, nothing but torch."""
    config = run_config(job, case)
    bases = (config.model.language_model, config.model.vision_tower)
    model = load_model(
        build_model_config(config.model), *bases, dtype=torch.float32, seed=config.seed
    ).train()
    trainable = model.trainable_parameters()
    optimizer = torch.optim.AdamW(
        parameter_groups(trainable, config.train.weight_decay), betas=config.train.betas
    )
    losses = []
    for step in range(case["steps"]):
        set_learning_rate(optimizer.param_groups, learning_rate(step, config.train, case["steps"]))
        optimizer.zero_grad()
        loss = model(**make_rows(step, case["kind"]).inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), config.train.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.data for name, p in trainable.items()}


CASES = {
    "zero3": (3, {"kind": "pictures", "micro_batch_size": 4}),
    "zero3-checkpointing-accumulation-mixed-rows": (
        3,
        {"kind": "mixed", "micro_batch_size": 1, "activation_checkpointing": True},
    ),
    "zero3-static-router-accumulation-mixed-rows": (
        3,
        {"kind": "mixed", "micro_batch_size": 2, "router": "static"},
    ),
    "zero3-prefix-mixed-rows": (3, {"kind": "mixed", "micro_batch_size": 4, "fusion": "prefix"}),
    "zero2-accumulation-mixed-rows": (2, {"kind": "mixed", "micro_batch_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_plain_pytorch(job: Path, name: str) -> None:
    stage, case = CASES[name]
    case = case | {"steps": STEPS}
    expected, parameters = run_plain(job, case)
    result, trained = run_deepspeed(job, case, stage)
    assert result["losses"] == pytest.approx(expected, rel=1e-5)
    assert result["silent"] == []
    assert trained.keys() == parameters.keys()
    for key, value in parameters.items():
        # By norm: where a gradient is rounding noise, Adam's step is that noise at full size.
        assert (trained[key] - value).norm() <= 5e-3 * value.norm() + 1e-5, key
    # The comparison is not of two models that stand still.
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_bf16_follows_fp32_and_keeps_its_buffers_in_fp32(job: Path, stage: int) -> None:
    case = {"kind": "mixed", "micro_batch_size": 2, "steps": 8}
    expected, _ = run_plain(job, case)
    result, trained = run_deepspeed(job, case, stage, bf16=True)
    assert result["losses"] == pytest.approx(expected, rel=1e-2)
    assert result["losses"] != pytest.approx(expected, rel=1e-6)
    # Rotary frequencies among them: rounded to bf16 they would turn far positions wrong.
    assert result["buffers"] == ["torch.float32"]
    assert {value.dtype for value in trained.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_a_step_that_is_not_finite_is_not_taken(job: Path, stage: int) -> None:
    case = {"kind": "pictures", "micro_batch_size": 2, "steps": 6}
    poisoned, weights = run_deepspeed(job, case | {"poison": [2, 3]}, stage)
    assert poisoned["taken"] == [True, True, False, False, True, True]
    assert all(value.isfinite().all() for value in weights.values())
    # Nothing of the poisoned windows is left in a gradient buffer: the loss goes on as from step 2.
    clean, _ = run_deepspeed(job, case, stage)
    assert poisoned["losses"][:2] == clean["losses"][:2]
    assert all(loss < 10 for loss in poisoned["losses"][4:])
