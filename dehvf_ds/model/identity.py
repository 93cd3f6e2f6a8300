"""Moved; this name goes with its last import."""

from .adapter import check_base  # noqa: F401
