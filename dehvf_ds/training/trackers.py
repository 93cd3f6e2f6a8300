"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, ...) by accelerate; rank 0 alone has them."""

from __future__ import annotations

import json
import logging
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dehvf_ds.atomic import atomic_file
from dehvf_ds.config import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

ID_FILE = "trackers.json"
"""By tracker, the id under which a restarted run continues the same tracked run."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that accelerate does not know, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers: no {name}; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise UserError(f"train.trackers: {name} is not installed here; pip install {name}")


class Trackers:
    """The trackers of one run. One that fails is reported and left out from then on; the run continues.

    TensorBoard, wandb, swanlab and mlflow continue a restarted run (their ids are kept in the run directory);
    others begin a new one each time. ``names`` are accelerate's; ``settings`` are the run's by dotted name;
    ``start_step`` counts the steps that an earlier start of the run has done.
    """

    def __init__(
        self, names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], start_step: int
    ) -> None:
        self._id_file = run_dir / ID_FILE
        self._ids: dict[str, str] = {}
        if start_step and self._id_file.is_file():
            # Damaged, it costs the link to the earlier part, not the run.
            with suppress(OSError, ValueError):
                self._ids = dict(json.loads(self._id_file.read_text(encoding="utf-8")))
        self._open: dict[str, GeneralTracker] = {}
        for name in names:
            self._attempt(name, lambda name=name: self._start(name, run_dir, settings, start_step))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Logs a PNG, where a tracker takes pictures."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))

        from accelerate.tracking import TensorBoardTracker

        def log(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: pixels[None]}, step, dataformats="NHWC")  # pyright: ignore
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step)  # pyright: ignore

        self._each(log)

    def close(self) -> None:
        """Lets all of them write what they hold."""
        self._each(lambda tracker: tracker.finish())
        self._open = {}

    def _start(self, name: str, run_dir: Path, settings: Mapping[str, Any], start_step: int) -> None:
        from accelerate import tracking

        # Accelerate's own logger wants accelerate's process state, which has no part in this run.
        tracking.logger = logging.getLogger("accelerate.tracking")
        create: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        run_name = run_dir.resolve().name
        if name == "tensorboard":
            tracker = create(name, run_dir, purge_step=start_step + 1)
        elif name in ("wandb", "swanlab"):
            own_id = self._ids.setdefault(name, uuid.uuid4().hex[:16])
            tracker = create("dehvf_ds", id=own_id, resume="allow", **{_NAME_OF[name]: run_name})
        elif name == "mlflow":
            tracker = create("dehvf_ds", run_name=run_name, run_id=self._ids.get(name))
        else:
            tracker = create(*[run_name, run_dir][: 1 + create.requires_logging_directory])
        tracker.main_process_only = False
        tracker.start()
        if name == "mlflow":
            self._ids[name] = tracker.active_run.info.run_id
        if name != "tensorboard" and not start_step:
            tracker.store_init_configuration(dict(settings))
        if self._ids:
            with atomic_file(self._id_file) as part:
                part.write_text(json.dumps(self._ids), encoding="utf-8")
        self._open[name] = tracker

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: act(tracker))

    def _attempt(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        # Whatever a tracker's client raises (its server is gone, its disk full), the training is worth more.
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            line = f"warning: train.trackers: without {name} from now on: {reason}"
            print(line, file=sys.stderr, flush=True)


_NAME_OF = {"wandb": "name", "swanlab": "experiment_name"}
