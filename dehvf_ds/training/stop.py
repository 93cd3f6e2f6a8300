"""How a run ends before its last step: asked by a signal, or because it cannot continue."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

from dehvf_ds.config import JobError
from dehvf_ds.distributed import REQUEUE_EXIT_CODE, StopNow

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Loader workers ignore them (``data.loader``), and the supervisor of a SLURM job hears them, too."""

STOP_S = 30.0
"""How long ranks that stop at once have for it."""


class TrainingError(JobError):
    """The run cannot continue; the message says why. What was saved stays."""


class SavingError(JobError):
    """Too many checkpoints in a row could not be written; training on would be for nothing."""

    code = 74


class StopRequest:
    """Whether this process was asked to stop; the trainer stops all ranks together after a step.

    Installed before weights load, so that a signal in the warm-up is not lost. A second signal changes
    nothing; a scheduler's SIGKILL comes anyway. Loader workers have handlers of their own.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Takes the signals over."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def exit_on_signal() -> None:
    """Makes the stop signals end all ranks at once, to be started again; for work that is kept."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_now)


def _stop_now(number: int, frame: FrameType | None) -> NoReturn:
    # Once: many clusters signal the shell, which passes it on, and the process too.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # A library may catch what is raised here, in a callback.
    late = threading.Timer(STOP_S, os._exit, [REQUEUE_EXIT_CODE])
    late.daemon = True
    late.start()
    raise StopNow
