"""The DeepSpeed JSON: what passes through, what is filled in, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from dehvf_ds.training.deepspeed_json import SUPPORTED, read_deepspeed_json

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
    refused = refusal(tmp_path, zero(zero_hpz_partition_size=3), world=4)
    assert "zero_hpz_partition_size 3 does not divide the 4 ranks" in refused


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
    found = read(tmp_path, content | more | {"train_batch_size": "auto", "gradient_clipping": 1})
    assert found.items() >= content.items()
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [found[key] for key in (*sizes, "gradient_clipping")] == [32, 4, 4, 1.0]
    assert "_why" not in found


@pytest.mark.parametrize("name", SUPPORTED)
def test_auto_is_deepspeeds_default_or_refused(tmp_path: Path, name: str) -> None:
    # DeepSpeed takes the text for true, or for no number.
    *sections, key = name.split(".")
    content: dict = {"zero_optimization": {"stage": 2}}
    section = content
    for part in sections:
        section = section.setdefault(part, {})
    plain = read(tmp_path, content)
    section[key] = "auto"
    # What a default would silently decide: how gradients are summed, where weights are kept.
    if key in ("stage", "device", "communication_data_type", "grad_accum_dtype"):
        assert f"{name} is 'auto'; it must be" in refusal(tmp_path, content)
    elif name not in ("bf16.enabled", "zero_optimization.zero_hpz_partition_size"):
        assert read(tmp_path, content) == plain


@pytest.mark.parametrize(
    "off",
    [
        zero() | {"fp16": {"enabled": False, "loss_scale": 0}},
        zero() | {"tensorboard": {"enabled": "auto", "output_path": "x"}},
        zero() | {"activation_checkpointing": {"partition_activations": False}},
        zero() | {"sparse_gradients": False, "optimizer": None},
        zero(offload_optimizer={"device": "none", "nvme_path": "/x"}, zero_quantized_weights=False),
    ],
)
def test_what_is_switched_off_is_accepted(tmp_path: Path, off: dict) -> None:
    assert read(tmp_path, off) == read(tmp_path, zero())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # What the run's configuration owns.
        ({"train_batch_size": 64}, "train_batch_size is 64, but train.global_batch_size is 32"),
        ({"gradient_accumulation_steps": 2}, "but the derived accumulation is 4"),
        # What DeepSpeed ignores.
        ({"wall_clock_breakdwn": True}, "did you mean wall_clock_breakdown?"),
        ({"zero_optimisation": ON}, "did you mean zero_optimization?"),
        ({"bf16": {"enable": True}}, "bf16.enable is not a supported key"),
        ({"bf16.enabled": True}, "bf16.enabled is not a supported key"),
        (
            zero(offload_param={"pin_memry": True}),
            "zero_optimization.offload_param.pin_memry is not a supported key",
        ),
        # What is set elsewhere, or not supported.
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by train.*"),
        ({"fp16": {"enabled": "true"}}, "fp16 is not supported; enable bf16"),
        ({"compression_training": {"weight_quantization": {"a": 1}}}, "would change the frozen weights"),
        (zero(offload_optimizer={"device": "cpu"}), "offload_optimizer is not supported"),
        (zero(stage3_module_granularity_threshold=10**6), "is not needed: layers are gathered at once"),
        (zero(leaf_module={"classes": ["LlamaDecoderLayer"]}), "is not needed"),
        (zero(offload_param={"device": "nvme"}), 'is \'nvme\'; it must be "cpu" or "none"; nvme is not'),
        (zero(stage=2, offload_param={"device": "cpu"}), "needs stage 3, but the stage is 2"),
        # Values of another kind, which DeepSpeed may take for true.
        ({"prescale_gradients": "false"}, "is 'false'; it must be true or false, without quotes"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; it must be true or false"),
        ({"bf16": "auto"}, "bf16 is 'auto', not a section in braces"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True; it must be a number"),
        (zero(reduce_bucket_size="5e8"), "reduce_bucket_size is '5e8'; it must be a number, without quotes"),
        (zero(reduce_bucket_size=-5), "reduce_bucket_size is -5"),
        ({"communication_data_type": "float32"}, 'is \'float32\'; it must be "fp32" or "bf16"'),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; it must be a number above 0"),
        (zero(sub_group_size=2.5), "sub_group_size is 2.5; it must be a whole number above 0"),
        *((zero(stage=stage), "zero_optimization.stage is ") for stage in (0, "2", True, 2.5, [3])),
        ({"zero_optimization": {}}, "stage is missing; it must be 1, 2 or 3"),
        (zero(stage=1) | {"bf16": ON, "data_types": {"grad_accum_dtype": "fp32"}}, "stage 1"),
        # What DeepSpeed's own configuration refuses.
        (zero(reduce_bucket_size=2.5), "DeepSpeed refuses it"),
        # No JSON object, or not what it looks like.
        *((text, "") for text in ("{", "[1]", "[" * 100_000)),
        ('{"gradient_clipping": NaN}', "NaN is not valid JSON"),
        ('{"zero_optimization": {"stage": 2, "st\\u0061ge": 3}}', "the key 'stage' occurs twice"),
    ],
)
def test_what_would_do_something_else_is_refused_by_name(tmp_path: Path, content, message: str) -> None:
    assert message in refusal(tmp_path, content)
