"""What a run is made of: frozen dataclasses, their cross-field checks, YAML and flags.

One owner per number: this configuration owns batch sizes, learning rate, steps and data; the JSON
given by ``--deepspeed`` owns memory, precision and communication (DESIGN of the repository, README).
"""

from dehvf_ds.config.answers import EvalConfig, GenerateConfig
from dehvf_ds.config.data import AugmentConfig, DataConfig, ScienceqaConfig
from dehvf_ds.config.errors import JobError, UnsupervisedError, UserError
from dehvf_ds.config.model import LoraConfig, ModelConfig
from dehvf_ds.config.parse import (
    load_run_config,
    parse_config,
    parse_eval_config,
    parse_generate_config,
    parse_run_config,
    save_run_config,
    to_plain,
)
from dehvf_ds.config.paths import expand_flags
from dehvf_ds.config.run import InsideConfig, RunConfig, TrainConfig
from dehvf_ds.config.shipped import (
    DEEPSPEED_DIR,
    RECIPES_DIR,
    find_deepspeed_json,
    find_recipe,
    looked_in,
)

__all__ = [
    "DEEPSPEED_DIR",
    "RECIPES_DIR",
    "AugmentConfig",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "InsideConfig",
    "JobError",
    "LoraConfig",
    "ModelConfig",
    "RunConfig",
    "ScienceqaConfig",
    "TrainConfig",
    "UnsupervisedError",
    "UserError",
    "expand_flags",
    "find_deepspeed_json",
    "find_recipe",
    "load_run_config",
    "looked_in",
    "parse_config",
    "parse_eval_config",
    "parse_generate_config",
    "parse_run_config",
    "save_run_config",
    "to_plain",
]
