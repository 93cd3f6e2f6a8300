"""Moved; this name goes with its last import."""

from .adapter import EXPORT_FILE, TrainedModel, find_adapter, find_trained  # noqa: F401
from .backbones import build_config, check_bases, load_model  # noqa: F401
from .backbones import settle_head as settle_head_of  # noqa: F401
