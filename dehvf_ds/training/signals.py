"""A request to stop: a signal sets a flag, and the loop stops all ranks together after a step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

from dehvf_ds.distributed import StopNow

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop.

    Installed before weights load, so that a signal in the warm-up is not lost. A second signal changes
    nothing; a scheduler's SIGKILL comes anyway. Loader workers put handlers of their own.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Takes the signals over."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def exit_on_request() -> None:
    """Makes the stop signals end all ranks at once, to be started again; for work that is kept."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_now)


def _stop_now(number: int, frame: FrameType | None) -> NoReturn:
    raise StopNow
