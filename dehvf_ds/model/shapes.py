"""The types that annotations name shapes with: jaxtyping's, or nothing where it is not installed.

They are never evaluated; so a model that travels beside its weights needs torch and transformers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from jaxtyping import Bool, Float, Int
except ImportError:
    if not TYPE_CHECKING:
        Bool = Float = Int = None

__all__ = ["Bool", "Float", "Int"]
