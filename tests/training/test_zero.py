"""DeepSpeed over two ranks against one plain PyTorch process, and the shipped DeepSpeed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import REPOSITORY, run_ranks
from tiny_models import LORA, text_config, vision_config
from training.zero_worker import make_rows, run_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.distributed import World
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.engine import build_model_config, learning_rate, parameter_groups, set_learning_rate
from dehvf_ds.training.zero import full_copy

WORKER = Path(__file__).parent / "zero_worker.py"
CONFIGS = REPOSITORY / "ds_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
STEPS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(directory / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(directory / "tower")
    return directory


def run_deepspeed(job: Path, case: dict, zero: dict, *, ranks: int = 2, **more: Any) -> dict:
    """What a DeepSpeed job found. Threshold 0, the default here, partitions even the smallest parameter."""
    if zero["stage"] == 3:
        zero = zero | {"stage3_param_persistence_threshold": case.get("threshold", 0)}
    (job / "ds.json").write_text(json.dumps({"zero_optimization": zero, **more}))
    run_ranks(WORKER, [str(job), json.dumps(case)], ranks)
    result = json.loads((job / "result.json").read_text())
    if zero["stage"] == 3:
        # Hooks on a layer, none within it; and DeepSpeed knows the order of modules, so it gathers ahead.
        assert (set(result["hooked"]), result["traced"]) == ({1}, True)
    return result


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
    "zero3-small-weights-whole": (3, {"kind": "mixed", "micro_batch_size": 2, "threshold": 300}),
    "zero3-small-weights-whole-checkpointing-evaluation": (
        3,
        {
            **{"kind": "pictures", "micro_batch_size": 4, "threshold": 300},
            **{"activation_checkpointing": True, "decode_at": 7},
        },
    ),
    "zero3-prefix-mixed-rows": (3, {"kind": "mixed", "micro_batch_size": 4, "fusion": "prefix"}),
    "zero3-shared-pictures": (3, {"kind": "shared", "micro_batch_size": 4}),
    "zero3-prefix-shared-pictures": (3, {"kind": "shared", "micro_batch_size": 2, "fusion": "prefix"}),
    "zero3-compiled": (3, {"kind": "mixed", "micro_batch_size": 2, "compile": True}),
    "zero3-compiled-checkpointing": (
        3,
        {"kind": "pictures", "micro_batch_size": 4, "compile": True, "activation_checkpointing": True},
    ),
    "zero2-accumulation-mixed-rows": (2, {"kind": "mixed", "micro_batch_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_plain_pytorch(job: Path, name: str) -> None:
    stage, case = CASES[name]
    case = case | {"steps": STEPS}
    expected, parameters = run_plain(job, case)
    result = run_deepspeed(job, case, {"stage": stage, "reduce_bucket_size": 100_000})
    trained = torch.load(job / "trained.pt")
    assert result["losses"] == pytest.approx(expected, rel=1e-5)
    assert result["silent"] == []
    if "threshold" in case:
        # What is frozen and whole is not gathered again in a step; what is trained is.
        assert result["stayed"] == [result["whole"], 0]
        assert result["whole"] > 0
    assert trained.keys() == parameters.keys()
    for key, value in parameters.items():
        # By norm: where a gradient is rounding noise, Adam's step is that noise at full size.
        assert (trained[key] - value).norm() <= 5e-3 * value.norm() + 1e-5, key
    if case["kind"] == "shared":
        # Rows shared a picture, and rank 1 had micro-batches without any.
        assert {(1, case["micro_batch_size"]), (1, 0)} <= set(map(tuple, result["shapes"]))
    # The comparison is not of two models that stand still.
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_bf16_follows_fp32_and_keeps_its_buffers_in_fp32(job: Path, stage: int) -> None:
    case = {"kind": "mixed", "micro_batch_size": 2, "steps": 8}
    expected, _ = run_plain(job, case)
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    result = run_deepspeed(job, case, {"stage": stage}, **precision)
    assert result["losses"] == pytest.approx(expected, rel=1e-2)
    assert result["losses"] != pytest.approx(expected, rel=1e-6)
    # Rotary frequencies among them: rounded to bf16 they would turn far positions wrong.
    assert result["buffers"] == ["torch.float32"]
    assert {value.dtype for value in torch.load(job / "trained.pt").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_neither_skipped_steps_nor_decoding_leave_a_trace(job: Path, stage: int) -> None:
    case = {"kind": "pictures", "micro_batch_size": 2, "steps": 6}
    clean = run_deepspeed(job, case, {"stage": stage})
    poisoned = run_deepspeed(job, case | {"poison": [2, 3]}, {"stage": stage})
    weights = torch.load(job / "trained.pt")
    assert poisoned["taken"] == [True, True, False, False, True, True]
    assert all(value.isfinite().all() for value in weights.values())
    # Nothing of the poisoned windows is left in a gradient buffer: the loss goes on as from step 2.
    assert poisoned["losses"][:2] == clean["losses"][:2]
    assert all(loss < 10 for loss in poisoned["losses"][4:])

    decoded = run_deepspeed(job, case | {"decode_at": 3}, {"stage": stage})
    assert decoded["losses"] == clean["losses"]
    assert decoded["losses_of_both"][0] == pytest.approx(decoded["losses_of_both"][1], rel=1e-6)
    # Ranks decode other rows, to other lengths.
    assert decoded["lengths"] == [3, 8]


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_a_full_model_is_equal_and_apart(tmp_path: Path, job: Path, tied: bool) -> None:
    text = text_config()
    text.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
    config = build_config(str(tmp_path / "llm"), str(job / "tower"), feature_layers=[1, 4], lora=LORA)
    model = load_model(config, str(tmp_path / "llm"), str(job / "tower"), dtype=torch.bfloat16)
    copy = full_copy(model, World(0, 0, 1, 1, torch.device("cpu")))
    expected, found = model.state_dict(), copy.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype
        assert found[name].data_ptr() != value.data_ptr()
    embedding, head = copy.get_input_embeddings().weight, copy.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied


# --- the files in ds_configs/ ---


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key_and_the_numbers_fit_our_model(name: str) -> None:
    found = read_deepspeed_json(name, run_config(Path("unused"), {"micro_batch_size": 4}), 1)
    assert compute_dtype(found) == (torch.bfloat16 if found["bf16"]["enabled"] else torch.float32)
    given = json.loads((CONFIGS / f"{name}.json").read_text())
    assert given["bf16"] == {"enabled": "auto"}
    assert given["data_types"] == {"grad_accum_dtype": "fp32"}
    # Settings of the run, which a value here would contradict.
    assert not given.keys() & {"train_batch_size", "gradient_clipping", "optimizer", "scheduler"}
    zero = given["zero_optimization"]
    # DeepSpeed's default buckets of 5e8 are 1 GB of bf16, for 5 M trainable parameters.
    assert zero["reduce_bucket_size"] == 20_000_000
    if zero["stage"] == 3:
        # The largest trainable of the 13B recipe is 655,360; a matrix of CLIP's attention 1024 x 1024.
        assert 655_360 < zero["stage3_param_persistence_threshold"] < 1024 * 1024


@pytest.mark.slow
def test_all_files_train_the_same(job: Path) -> None:
    assert NAMES == ["zero2", "zero3", "zero3_hpz", "zero3_offload"]
    case = {"kind": "mixed", "micro_batch_size": 2, "steps": 2}
    losses: dict[str, list[float]] = {}
    # On the CPU the offloaded partitions are not page-locked, and lie where they would lie anyway.
    for name in NAMES:
        given = json.loads((CONFIGS / f"{name}.json").read_text())
        hpz = name == "zero3_hpz"
        zero = given.pop("zero_optimization") | ({"zero_hpz_partition_size": 2} if hpz else {})
        off = {"bf16": {"enabled": False}}
        result = run_deepspeed(job, case, zero, ranks=4 if hpz else 2, **(given | off))
        # DeepSpeed trains without hpZ, and the same, where it does not understand the size.
        assert (result["hpz_ranks"] == 2) == hpz
        assert result["silent"] == []
        losses[name] = result["losses"]
    assert losses["zero3"][0] > losses["zero3"][1] + 1e-3
    assert all(found == pytest.approx(losses["zero3"], rel=1e-5) for found in losses.values())
