"""Answers and scores in the middle of a run, by a full model on every rank."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dehvf_ds.config import InsideConfig, UserError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.dataset import Prediction, Questions
from dehvf_ds.evaluation.evaluate import lines_of, open_scorer_on_main, score, try_examples, write_lines
from dehvf_ds.evaluation.predict import in_batches
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.loop import Evaluated
from dehvf_ds.training.replica import whole_model
from dehvf_ds.training.signals import StopRequest

SCORE = {"coco": "CIDEr", "scienceqa": "accuracy"}
"""The number that tells which checkpoint is the best, the higher the better."""


class InTrainingEvaluation:
    """Asks a fixed set of rows, scores the answers and draws examples, all into the run's ``samples``."""

    def __init__(
        self,
        *,
        config: InsideConfig,
        questions: Questions,
        model: DehvfForConditionalGeneration,
        world: World,
        run_dir: Path,
        stop: StopRequest,
    ) -> None:
        """Looks at the rows' records before the first step. Every rank must construct it.

        The model is the one inside the engine; it is gathered and not changed.
        """
        self._config, self._questions, self._model = config, questions, model
        self._world, self._samples, self._stop = world, run_dir / "samples", stop
        name = run_dir.resolve().name
        self._scorer = open_scorer_on_main(world, questions, name=name, tokenizer=config.tokenizer)

    def __call__(self, step: int) -> Evaluated | None:
        """Evaluates the weights as they are. Every rank must call it.

        Rows and scores that fail leave the run alive, and are told. None where the evaluation was ended early
        or nothing could be scored.
        """
        started = time.perf_counter()
        try:
            asked = self._predict()
        except UserError as error:
            _warn(f"step {step} not evaluated: rank {self._world.rank}: {error}; the run goes on")
            asked = None
        if all_reduce_sum([float(asked is None)], self._world.device)[0]:
            return None
        gathered = sorted(gather_to_main(asked or [], self._world), key=lambda pair: pair[0])

        def finish() -> Evaluated | None:
            try:
                return self._finish(step, [prediction for _, prediction in gathered], started)
            # Whatever it is, the other ranks wait, and the training is worth more.
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                _warn(f"step {step} not evaluated: {reason}; the run goes on")
                return None

        return on_main(self._world, finish)

    def _predict(self) -> list[tuple[int, Prediction]] | None:
        """This rank's rows with their predictions; None after a request to stop."""
        asked: list[tuple[int, Prediction]] = []
        own = range(self._world.rank, self._questions.num_rows, self._world.size)
        with whole_model(self._model, self._world) as model:
            for rows in in_batches(own, self._config.batch_size):
                if self._stop.requested:
                    return None
                asked += zip(rows, self._questions.ask(model, rows), strict=True)
        return asked

    def _finish(self, step: int, predictions: list[Prediction], started: float) -> Evaluated:
        assert self._scorer is not None
        sheet = self._samples / f"step_{step:08d}.png"
        # The predictions first, which cost the most.
        write_lines(sheet.with_suffix(".jsonl"), lines_of(self._scorer, predictions))
        scored = score(self._scorer, predictions)
        write_lines(sheet.with_suffix(".jsonl"), scored.lines)
        for line in scored.summary:
            if line.startswith("warning: "):
                _warn(f"step {step}: {line.removeprefix('warning: ')}")
        best = SCORE[self._questions.task]
        if reason := scored.metrics.get("missing", {}).get(best):
            _warn(f"step {step}: without {best}, which tells the best checkpoint: {reason}")
        if reason := try_examples(self._questions.index, scored.lines, sheet):
            _warn(f"step {step}: without {sheet.name}: {reason}")
        numbers = {f"eval/{name}": value for name, value in scored.numbers.items()}
        numbers["eval/seconds"] = time.perf_counter() - started
        shown = sheet if sheet.is_file() else None
        return Evaluated(score=scored.numbers.get(best), numbers=numbers, sheet=shown)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
