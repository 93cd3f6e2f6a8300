from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dehvf_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig, UserError
from dehvf_ds.training.deepspeed_json import compute_dtype, read_deepspeed_json
from dehvf_ds.training.deepspeed_keys import SUPPORTED

REPOSITORY = Path(__file__).parents[2]
CONFIG = RunConfig(
    run_dir="run",
    model=ModelConfig(language_model="llm", vision_tower="tower"),
    data=DataConfig(train="data"),
    train=TrainConfig(global_batch_size=32, micro_batch_size=4),
)


def written(tmp_path: Path, content: dict) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
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
        ({"train_batch_size": "32"}, "train_batch_size is '32'; it must be a number, without quotes"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True; it must be a number"),
    ],
)
def test_a_key_that_contradicts_ours_is_refused_with_both_names(tmp_path: Path, content, message) -> None:
    with pytest.raises(UserError, match=message):
        read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=2)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (
            "",
            "wall_clock_breakdwn",
            "wall_clock_breakdwn is no key that is supported here; did you mean wall_cl",
        ),
        (
            "",
            "zero_optimisation",
            "zero_optimisation is no key that is supported here; did you mean zero_opt",
        ),
        ("", "gradient_allreduce", "gradient_allreduce is no key that is supported here"),
        ("data_types", "grad_acum_dtype", "data_types.grad_acum_dtype is no key"),
        ("bf16", "enable", "bf16.enable is no key that is supported here; did you mean enabled?"),
        ("zero_optimization", "stage3_max_live_params", "did you mean stage3_max_live_parameters?"),
        ("zero_optimization", "offload_param", "zero_optimization.offload_param.pin_memry is no key"),
        ("", "amp", "amp is not supported; enable bf16"),
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
        "flops_profiler": {"enabled": True, "module_depth": -1},
        "comms_logger": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "prescale_gradients": True,
    }
    read = read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=2)
    assert read.items() >= {key: value for key, value in content.items() if key != "_why"}.items()


OFF = {
    "fp16": {"enabled": False, "loss_scale": 0},
    "amp": {"enabled": False},
    "tensorboard": {"enabled": False, "output_path": "x"},
    "wandb": {"enabled": False},
    "elasticity": {"enabled": False},
    "activation_checkpointing": {"partition_activations": False},
    "sparse_gradients": False,
    "optimizer": None,
}


@pytest.mark.parametrize("key", [*OFF, "auto"])
def test_what_is_switched_off_may_stand_there(tmp_path: Path, key: str) -> None:
    off = OFF.get(key, {"enabled": "auto"})
    read = read_deepspeed_json(written(tmp_path, {key if key in OFF else "fp16": off}), CONFIG, world_size=2)
    assert key not in read


ON = {"enabled": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by train"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by train"),
        ({"fp16": ON}, "fp16 is not supported; enable bf16"),
        ({"fp16": ON, "bf16": ON}, "fp16 is not supported"),
        ({"fp16": {"enabled": "true"}}, "fp16 is not supported"),
        *(
            ({name: ON}, f"{name} is not written")
            for name in ("tensorboard", "wandb", "csv_monitor", "comet")
        ),
        ({"wandb": {"enabled": "true"}}, "wandb is not written"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set train.activation_checkpointing"),
        ({"compression_training": {"weight_quantization": {"a": 1}}}, "compression_training would change"),
        *(
            ({name: ON}, f"{name} is not supported")
            for name in (
                "elasticity",
                "autotuning",
                "curriculum_learning",
                "data_efficiency",
                "hybrid_engine",
            )
        ),
        ({"pipeline": {"stages": 2}}, "pipeline is not supported"),
        ({"aio": {"block_size": 1}}, "nvme is not supported"),
        ({"bfloat16": ON}, "bfloat16 is an old name; write bf16"),
        ({"sparse_gradients": True}, "sparse_gradients is not supported"),
        ({"bf16": True}, "bf16 is True, not a section in braces"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled is 'true'; it must be true or false, without quotes"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; it must be true or false"),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "bf16.bf16_optimizer_states is not supp",
        ),
        ({"zero_optimization": True}, "zero_optimization is True, not a section"),
        ({"zero_optimization": None}, "zero_optimization.stage is missing; it must be 1, 2 or 3"),
        ({"zero_optimization": {}}, "stage is missing"),
        *(
            ({"zero_optimization": {"stage": stage}}, "zero_optimization.stage is ")
            for stage in (0, 4, -1, "2", True, 2.5, "auto", None, [3])
            if stage is not None
        ),
        (
            {"zero_optimization": {"stage": 1}, "bf16": ON, "data_types": {"grad_accum_dtype": "fp32"}},
            "stage 1",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype is 'fp8'"),
        ({"communication_data_type": "float32"}, "communication_data_type is 'float32'; it must be \"fp32\""),
        ({"gradient_predivide_factor": float("inf")}, "Infinity is no number of JSON"),
        ({"steps_per_print": "10"}, "steps_per_print is '10'; it must be a number, without quotes"),
    ],
)
def test_what_does_not_work_here_is_refused_by_name(tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=2)
    assert "ds.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer is not supported"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer is not supported"),
        ({"offload_param": {"device": "nvme"}}, "nvme is not supported"),
        ({"offload_param": {"device": "cpu", "nvme_path": "/x"}}, "nvme is not supported"),
        ({"offload_param": {"device": "disk"}}, 'is \'disk\'; it must be "cpu" or "none"'),
        ({"offload_param": {"device": "cpu", "pin_memory": "false"}}, "pin_memory is 'false'"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "is of stage 3, and the stage is 2"),
        (
            {"overlap_comm": "true"},
            "zero_optimization.overlap_comm is 'true'; it must be true or false, without",
        ),
        ({"reduce_bucket_size": "5e8"}, "zero_optimization.reduce_bucket_size is '5e8'; it must be a number"),
        ({"reduce_bucket_size": -5}, "zero_optimization.reduce_bucket_size is -5"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights would change the frozen weights"),
        ({"cpu_offload": True}, "cpu_offload is an old name"),
    ],
)
def test_of_zero_what_does_not_work_is_refused(tmp_path: Path, zero: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_deepspeed_json(
            written(tmp_path, {"zero_optimization": {"stage": 3} | zero}), CONFIG, world_size=2
        )


def test_of_zero_what_is_auto_off_or_a_float_passes(tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "offload_optimizer": {"device": "none"},
        "overlap_comm": None,
    }
    zero |= {"stage3_prefetch_bucket_size": "auto", "zero_quantized_weights": False, "_why": "for later"}
    read = read_deepspeed_json(written(tmp_path, {"zero_optimization": zero}), CONFIG, world_size=2)
    assert read["zero_optimization"].keys() == {"stage", "reduce_bucket_size"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {},\n"bf16": {}}', "bf16 stands there twice, in line 1 and in line 2"),
        (
            '{"a": "{",\n "zero_optimization": {"stage": 2,\n\n  "stage" : 3}}',
            "zero_optimization.stage stands there twice, in line 2 and in line 4",
        ),
        ('{"x": [{"a": 1}, {"a": 1, "\\u0061": 2}]}', "x.a stands there twice, in line 1 and in line 1"),
    ],
)
def test_a_key_that_stands_there_twice_is_named_with_both_lines(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_deepspeed_json(str(tmp_path / "ds.json"), CONFIG, world_size=1)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a multiple of train.micro_batch_size 4 x 3 ranks"):
        read_deepspeed_json(written(tmp_path, {}), CONFIG, world_size=3)


@pytest.mark.parametrize("text", ["{", "[1]", "", "{'a': 1}", '{"a": NaN}', "[" * 100_000])
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


@pytest.mark.parametrize("key", [key for key, wanted in SUPPORTED.items() if not isinstance(wanted, Mapping)])
def test_auto_is_deepspeeds_default(tmp_path: Path, key: str) -> None:
    # To DeepSpeed the text is true, or no number.
    if key == "communication_data_type":
        return
    plain = read_deepspeed_json(written(tmp_path, {}), CONFIG, world_size=1)
    assert read_deepspeed_json(written(tmp_path, {key: "auto"}), CONFIG, world_size=1) == plain


@pytest.mark.parametrize("value", [0, -1, 2.5])
@pytest.mark.parametrize(
    "key", ["steps_per_print", "zero_hpz_partition_size", "sub_group_size", "allgather_bucket_size"]
)
def test_what_deepspeed_divides_by_is_above_zero(tmp_path: Path, key: str, value: float) -> None:
    zero = {"stage": 3} | ({} if key == "steps_per_print" else {key: value})
    content = {"zero_optimization": zero} | ({key: value} if key == "steps_per_print" else {})
    with pytest.raises(UserError, match=f"{key} is {value}; it must be a whole number above 0"):
        read_deepspeed_json(written(tmp_path, content), CONFIG, world_size=1)


def test_gradients_are_not_divided_by_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gradient_predivide_factor is 0; it must be a number above 0"):
        read_deepspeed_json(written(tmp_path, {"gradient_predivide_factor": 0}), CONFIG, world_size=1)
    read = read_deepspeed_json(written(tmp_path, {"gradient_predivide_factor": 0.5}), CONFIG, world_size=1)
    assert read["gradient_predivide_factor"] == 0.5
