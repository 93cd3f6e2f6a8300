"""Moved; this name goes with its last import."""

from .fingerprint import bare_name as bare_name
from .fingerprint import weights_fingerprint as sketch_weights  # noqa: F401
