"""What ends a program with one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us. Entries print its one line and exit with code 2."""


class UnsupervisedError(UserError):
    """Rows without a single token to learn; every rank finds it, since the tokens are counted over all."""


class JobError(Exception):
    """Ends the job with one line and ``code``: no mistake of the user's, nor of a program."""

    code = 1


def require(condition: bool, message: str) -> None:
    """Raises ``UserError(message)`` unless the condition holds."""
    if not condition:
        raise UserError(message)
