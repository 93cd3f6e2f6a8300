"""Moved; this name goes with its last import."""

from transformers.modeling_utils import str_to_torch_dtype as SAFETENSORS_DTYPES  # noqa: F401

from .fingerprint import POINTER, StoredFile, StoredTensor, is_pointer, stored_tensors  # noqa: F401
