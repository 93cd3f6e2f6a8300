from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json

REPOSITORY = Path(__file__).parents[2]
CONFIG = RunConfig(
    run_dir="run",
    model=ModelConfig(language_model="llm", vision_tower="tower"),
    data=DataConfig(train="data"),
    train=TrainConfig(global_batch_size=32, micro_batch_size=4),
)


def written(tmp_path: Path, content: dict) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_hpz_auto_is_the_size_of_a_node(tmp_path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}})
    sizes = [
        read_deepspeed_json(path, CONFIG, world_size=world, local_size=local)["zero_optimization"]
        for world, local in ((4, 2), (2, 2), (1, 1))
    ]
    assert [zero["zero_hpz_partition_size"] for zero in sizes] == [2, 1, 1]
    path = written(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}})
    with pytest.raises(UserError, match="zero_hpz_partition_size 3 does not divide the 4 ranks"):
        read_deepspeed_json(path, CONFIG, world_size=4)


def test_sizes_and_clipping_come_from_our_configuration(tmp_path: Path) -> None:
    read = read_deepspeed_json(written(tmp_path, {"train_batch_size": "auto"}), CONFIG, world_size=2)
    assert read["train_batch_size"] == 32
    assert read["train_micro_batch_size_per_gpu"] == 4
    assert read["gradient_accumulation_steps"] == 4
    assert read["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, but train.global_batch_size is 32"),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2, but the derived accumulation is 4",
        ),
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, but train.max_grad_norm is 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by train"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by train"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"bf16": True}, "bf16 is True, not a section in braces"),
    ],
)
def test_a_key_that_contradicts_ours_is_refused_with_both_names(tmp_path: Path, content, message) -> None:
    with pytest.raises(UserError, match=message):
        read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=2)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("", "wall_clock_breakdwn", "knows no key wall_clock_breakdwn; did you mean wall_clock_breakdown?"),
        ("", "zero_optimisation", "knows no key zero_optimisation; did you mean zero_optimization?"),
        ("data_types", "grad_acum_dtype", "no key data_types.grad_acum_dtype; did you mean grad_accum_dtype"),
        ("bf16", "enable", "enable: Extra inputs are not permitted"),
        ("zero_optimization", "stage3_max_live_params", "stage3_max_live_params: Extra inputs"),
        ("zero_optimization", "offload_param", "offload_param.pin_memry: Extra inputs"),
        ("", "amp", "DeepSpeed refuses it: NVIDIA Apex AMP integration has been removed"),
    ],
)
def test_a_key_that_deepspeed_passes_over_is_refused(tmp_path: Path, section, key, message) -> None:
    content = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text())
    value = {"device": "cpu", "pin_memry": True} if key == "offload_param" else {"enabled": True}
    (content[section] if section else content)[key] = value
    with pytest.raises(UserError, match=re.escape(message)):
        read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=1)


def test_known_sections_and_comments_pass(tmp_path: Path) -> None:
    content = {
        "_why": "for the profile",
        "flops_profiler": {"enabled": True},
        "comms_logger": {"enabled": True},
        "activation_checkpointing": {"profile": True},
        "tensorboard": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "prescale_gradients": True,
    }
    read = read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=2)
    assert read.items() >= content.items()


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a multiple of train.micro_batch_size 4 x 3 ranks"):
        read_deepspeed_json(written(tmp_path, {}), CONFIG, world_size=3)


@pytest.mark.parametrize("text", ["{", "[1]", '{"bf16": {}, "bf16": {}}'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=r"ds\.json: "):
        read_deepspeed_json(str(tmp_path / "ds.json"), CONFIG, world_size=1)


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_shipped_configurations_resolve_their_precision(name: str) -> None:
    read = read_deepspeed_json(str(REPOSITORY / "ds_configs" / name), CONFIG, world_size=1)
    assert isinstance(read["bf16"]["enabled"], bool)
    expected = torch.bfloat16 if read["bf16"]["enabled"] else torch.float32
    assert compute_dtype(read) == expected
