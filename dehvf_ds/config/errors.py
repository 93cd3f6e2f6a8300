"""A mistake of the user."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us. Entries print its one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raises ``UserError(message)`` unless the condition holds."""
    if not condition:
        raise UserError(message)
