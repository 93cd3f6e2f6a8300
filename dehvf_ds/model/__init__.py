"""The model. Self-contained: it imports nothing else of the package and travels beside exported weights."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration import DehvfConfig, ModelError
from .modeling import DehvfForConditionalGeneration, DehvfOutput
from .processing import DehvfProcessor

AutoConfig.register(DehvfConfig.model_type, DehvfConfig)
AutoModelForImageTextToText.register(DehvfConfig, DehvfForConditionalGeneration)
AutoProcessor.register(DehvfConfig, DehvfProcessor)
# `save_pretrained` writes the code beside the weights, for `trust_remote_code`.
DehvfConfig.register_for_auto_class()
DehvfForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
DehvfProcessor.register_for_auto_class()

__all__ = ["DehvfConfig", "DehvfForConditionalGeneration", "DehvfOutput", "DehvfProcessor", "ModelError"]
