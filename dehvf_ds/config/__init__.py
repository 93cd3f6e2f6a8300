"""The configuration of the programs: frozen dataclasses, their cross-field checks, YAML and flags.

Each number has one owner: batch sizes, learning rate, steps and data are set here; memory, precision and
communication in the JSON file of ``--deepspeed``.
"""

from pydantic_core import to_jsonable_python as to_plain  # noqa: F401

from dehvf_ds.config.parse import DEEPSPEED_DIR as DEEPSPEED_DIR
from dehvf_ds.config.parse import RECIPES_DIR as RECIPES_DIR
from dehvf_ds.config.parse import find_deepspeed_json as find_deepspeed_json
from dehvf_ds.config.parse import find_recipe as find_recipe
from dehvf_ds.config.parse import ignored_settings as ignored_settings
from dehvf_ds.config.parse import load_run_config as load_run_config
from dehvf_ds.config.parse import looked_in as looked_in
from dehvf_ds.config.parse import parse_config as parse_config
from dehvf_ds.config.parse import parse_eval_config as parse_eval_config
from dehvf_ds.config.parse import parse_generate_config as parse_generate_config
from dehvf_ds.config.parse import parse_run_config as parse_run_config
from dehvf_ds.config.parse import save_run_config as save_run_config
from dehvf_ds.config.parse import suggestion as suggestion
from dehvf_ds.config.settings import AugmentConfig as AugmentConfig
from dehvf_ds.config.settings import DataConfig as DataConfig
from dehvf_ds.config.settings import EvalConfig as EvalConfig
from dehvf_ds.config.settings import GenerateConfig as GenerateConfig
from dehvf_ds.config.settings import InTrainingConfig as InTrainingConfig
from dehvf_ds.config.settings import LoraConfig as LoraConfig
from dehvf_ds.config.settings import ModelConfig as ModelConfig
from dehvf_ds.config.settings import RunConfig as RunConfig
from dehvf_ds.config.settings import ScienceqaConfig as ScienceqaConfig
from dehvf_ds.config.settings import TrainConfig as TrainConfig
from dehvf_ds.config.values import JobError as JobError
from dehvf_ds.config.values import UnsupervisedError as UnsupervisedError
from dehvf_ds.config.values import UserError as UserError
from dehvf_ds.config.values import expand_flags as expand_flags
from dehvf_ds.config.values import require as require
from dehvf_ds.config.values import settings_of as settings_of
