"""The DeepSpeed JSON: what passes through, what is filled in, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from dehvf_ds.training.deepspeed_json import SUPPORTED, compute_dtype, read_deepspeed_json

REPOSITORY = Path(__file__).parents[2]
CONFIG = RunConfig(
    run_dir="run",
    model=ModelConfig(language_model="llm", vision_tower="tower"),
    data=DataConfig(train="data"),
    train=TrainConfig(global_batch_size=32, micro_batch_size=4),
)
ON = {"enabled": True}


def read(tmp_path: Path, content: dict | str, world: int = 2, local: int | None = None) -> dict:
    path = tmp_path / "ds.json"
    stage = {"zero_optimization": {"stage": 2}}
    path.write_text(content if isinstance(content, str) else json.dumps(stage | content))
    return read_deepspeed_json(str(path), CONFIG, world, local)


def refusal(tmp_path: Path, content: dict | str, world: int = 2) -> str:
    with pytest.raises(UserError, match=r"ds\.json: ") as error:
        read(tmp_path, content, world)
    assert "\n" not in str(error.value)
    return str(error.value)


def zero(stage: object = 3, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage} | more}


def test_hpz_auto_is_the_size_of_a_node(tmp_path: Path) -> None:
    auto = zero(zero_hpz_partition_size="auto")
    found = [read(tmp_path, auto, *ranks)["zero_optimization"] for ranks in ((4, 2), (2, 2), (1, 1))]
    assert [section["zero_hpz_partition_size"] for section in found] == [2, 1, 1]
    told = refusal(tmp_path, zero(zero_hpz_partition_size=3), world=4)
    assert "zero_hpz_partition_size 3 does not divide the 4 ranks" in told


def test_sizes_and_clipping_come_from_our_configuration(tmp_path: Path) -> None:
    found = read(tmp_path, {"train_batch_size": "auto", "gradient_clipping": 1})
    assert found["train_batch_size"] == 32
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 1.0


def test_what_is_supported_passes_unchanged_and_comments_do_not(tmp_path: Path) -> None:
    content = {
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": "x"},
        "comms_logger": {"enabled": True, "prof_ops": []},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
        "gradient_predivide_factor": 0.5,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8},
    }
    more = {"_why": "for the profile", "zero_optimization": content["zero_optimization"] | {"_why": "later"}}
    found = read(tmp_path, content | more)
    assert found.items() >= content.items()
    assert "_why" not in found


@pytest.mark.parametrize("name", SUPPORTED)
def test_auto_is_deepspeeds_default_or_refused(tmp_path: Path, name: str) -> None:
    # To DeepSpeed the text is true, or no number.
    content: dict = {"zero_optimization": {"stage": 2}, "bf16": {}, "data_types": {}, "flops_profiler": {}}
    plain = read(tmp_path, content | {"comms_logger": {}})
    *sections, key = name.split(".")
    section = content | {"comms_logger": {}}
    content = section
    for part in sections:
        section = section.setdefault(part, {})
    section[key] = "auto"
    # What a default would decide in silence: how gradients are summed, where weights lie.
    if key in ("stage", "device", "communication_data_type", "grad_accum_dtype"):
        assert f"{name} is 'auto'; it must be" in refusal(tmp_path, content)
    elif name not in ("bf16.enabled", "zero_optimization.zero_hpz_partition_size"):
        found = read(tmp_path, content)
        found["zero_optimization"].pop("offload_param", None)
        assert found == plain


@pytest.mark.parametrize(
    "off",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"fp16": {"enabled": "auto"}},
        {"tensorboard": {"enabled": False, "output_path": "x"}},
        {"activation_checkpointing": {"partition_activations": False}},
        {"sparse_gradients": False},
        {"optimizer": None},
        zero(offload_optimizer={"device": "none", "nvme_path": "/x"}, zero_quantized_weights=False),
        zero(overlap_comm=None),
    ],
)
def test_what_is_switched_off_may_stand_there(tmp_path: Path, off: dict) -> None:
    given = off if "zero_optimization" in off else off | zero()
    assert read(tmp_path, given) == read(tmp_path, zero())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # What the run's configuration owns.
        ({"train_batch_size": 64}, "train_batch_size is 64, but train.global_batch_size is 32"),
        ({"gradient_accumulation_steps": 2}, "but the derived accumulation is 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but train.max_grad_norm is 1.0"),
        # What DeepSpeed passes over.
        (
            {"wall_clock_breakdwn": True},
            "is no key that is supported here; did you mean wall_clock_breakdown?",
        ),
        ({"zero_optimisation": ON}, "did you mean zero_optimization?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype is no key"),
        ({"bf16": {"enable": True}}, "bf16.enable is no key"),
        ({"bf16.enabled": True}, "bf16.enabled is no key"),
        ({"overlap_com": False}, "overlap_com is no key"),
        (zero(offload_param={"pin_memry": True}), "zero_optimization.offload_param.pin_memry is no key"),
        # What works otherwise here, or not at all.
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by train.*"),
        ({"fp16": {"enabled": "true"}}, "fp16 is not supported; enable bf16"),
        ({"wandb": ON}, "wandb is not written"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set train.activation_checkpointing"),
        ({"compression_training": {"weight_quantization": {"a": 1}}}, "would change the frozen model"),
        ({"aio": {"block_size": 1}}, "aio is of nvme"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states is not supported"),
        (zero(offload_optimizer={"device": "cpu"}), "offload_optimizer is not supported"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights would change the frozen weights"),
        (zero(offload_param={"device": "nvme"}), 'is \'nvme\'; it must be "cpu" or "none"; nvme is not'),
        (zero(stage=2, offload_param={"device": "cpu"}), "is of stage 3, and the stage"),
        # Values of another kind, which DeepSpeed may take for true.
        ({"prescale_gradients": "false"}, "is 'false'; it must be true or false, without quotes"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; it must be true or false"),
        ({"bf16": "auto"}, "bf16 is 'auto', not a section in braces"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True; it must be a number"),
        (zero(reduce_bucket_size="5e8"), "reduce_bucket_size is '5e8'; it must be a number, without quotes"),
        (zero(reduce_bucket_size=-5), "reduce_bucket_size is -5"),
        ({"communication_data_type": "float32"}, 'is \'float32\'; it must be "fp32" or "bf16"'),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; it must be a number above 0"),
        *(
            (zero(**{key: value}), f"{key} is {value}; it must be a whole number above 0")
            for key in ("zero_hpz_partition_size", "sub_group_size", "allgather_bucket_size")
            for value in (0, 2.5)
        ),
        *((zero(stage=stage), "zero_optimization.stage is ") for stage in (0, 4, "2", True, 2.5, [3])),
        ({"zero_optimization": {}}, "stage is missing; it must be 1, 2 or 3"),
        (zero(stage=1) | {"bf16": ON, "data_types": {"grad_accum_dtype": "fp32"}}, "stage 1"),
        # What DeepSpeed's own configuration refuses.
        (zero(reduce_bucket_size=2.5), "DeepSpeed refuses it"),
        # No JSON object, or not as it looks.
        *((text, "") for text in ("{", "[1]", "", "{'a': 1}", "[" * 100_000)),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"zero_optimization": {"stage": 2, "st\\u0061ge": 3}}', "the key 'stage' occurs twice"),
    ],
)
def test_what_would_do_something_else_is_refused_by_name(tmp_path: Path, content, message: str) -> None:
    assert re.search(re.escape(message), refusal(tmp_path, content))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_shipped_configurations_resolve_their_precision(name: str) -> None:
    found = read_deepspeed_json(name, CONFIG, world_size=1)
    assert isinstance(found["bf16"]["enabled"], bool)
    assert compute_dtype(found) == (torch.bfloat16 if found["bf16"]["enabled"] else torch.float32)
