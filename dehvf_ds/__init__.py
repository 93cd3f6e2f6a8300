"""DEHVF: parameter-efficient vision-language fine-tuning on DeepSpeed."""

__version__ = "0.1.0"
