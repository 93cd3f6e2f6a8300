"""Answers and scores during a run, by a full model on every rank."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dehvf_ds.config import InTrainingConfig, UserError
from dehvf_ds.data.examples import read_sample
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.coco import require_java
from dehvf_ds.evaluation.dataset import Prediction, Questions, open_questions
from dehvf_ds.evaluation.evaluate import Scorer, open_scorer, score, try_examples
from dehvf_ds.evaluation.predict import in_batches
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.metrics import Evaluated
from dehvf_ds.training.resolve import ResolvedRun
from dehvf_ds.training.step import StopRequest
from dehvf_ds.training.zero import full_model

SCORE = {"caption": "CIDEr", "scienceqa": "accuracy"}
"""The score that decides which checkpoint is the best, the higher the better."""


class InTrainingEvaluation:
    """Asks a fixed set of rows, scores the answers and draws examples, all into the run's ``samples``."""

    def __init__(self, config: InTrainingConfig, questions: Questions, world: World, run_dir: Path) -> None:
        self.config, self.questions, self.world, self.run_dir = config, questions, world, run_dir
        self.scorer: Scorer | None = None

    @classmethod
    def of_run(cls, run: ResolvedRun) -> InTrainingEvaluation | None:
        """Opens the rows that a run evaluates on; None if it evaluates nothing."""
        config, settings = run.config, run.config.eval
        data, task = settings.data or config.data.val, config.data.task
        if not settings.every_steps or data is None or task == "chat":
            return None
        if task == "caption" and settings.tokenizer == "ptb":
            require_java()
        questions = open_questions(
            data,
            task,
            run.tokenizer,
            run.transform,
            prompt=run.model_config.prompt,
            scienceqa=config.data.scienceqa,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            max_samples=settings.max_samples,
        )
        questions.require_positions(run.model_config)
        return cls(settings, questions, run.world, Path(config.run_dir))

    def open(self) -> None:
        """Checks the rows' records before the first step. Every rank must call it."""
        on_main(self.world, self._open_scorer)

    def describe(self) -> str:
        """Opens the scorer and says in one line what will be asked. Rank 0 alone."""
        self._open_scorer()
        num_tokens = self.questions.collator([read_sample(self.questions.index, 0)]).input_ids.shape[1]
        return (
            f"{self.questions.index.directory}: {self.questions.num_rows} rows asked every "
            f"{self.config.every_steps} steps, the first in {num_tokens} tokens"
        )

    def _open_scorer(self) -> None:
        name = self.run_dir.resolve().name
        self.scorer = open_scorer(self.questions, name=name, tokenizer=self.config.tokenizer)

    def __call__(
        self, model: DehvfForConditionalGeneration, step: int, stop: StopRequest
    ) -> Evaluated | None:
        """Evaluates the current weights. Every rank must call it.

        The engine's model is gathered, not changed. A row or a score that fails is a warning, and the run
        continues. None if the evaluation was stopped early or nothing could be scored.
        """
        started = time.perf_counter()
        try:
            answered = self._predict(model, stop)
        except UserError as error:
            _warn(f"step {step} not evaluated: rank {self.world.rank}: {error}; the run goes on")
            answered = None
        if all_reduce_sum([float(answered is None)], self.world.device)[0]:
            return None
        gathered = sorted(gather_to_main(answered or [], self.world), key=lambda pair: pair[0])

        def finish() -> Evaluated | None:
            try:
                return self._finish(step, [prediction for _, prediction in gathered], started)
            # Whatever it is: the other ranks are waiting, and the training is worth more.
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                _warn(f"step {step} not evaluated: {reason}; the run goes on")
                return None

        return on_main(self.world, finish)

    def _predict(
        self, model: DehvfForConditionalGeneration, stop: StopRequest
    ) -> list[tuple[int, Prediction]] | None:
        """This rank's rows with their predictions; None after a request to stop."""
        answered: list[tuple[int, Prediction]] = []
        own = range(self.world.rank, self.questions.num_rows, self.world.size)
        with full_model(model, self.world) as gathered:
            for rows in in_batches(own, self.config.batch_size):
                if stop.requested:
                    return None
                answered += zip(rows, self.questions.ask(gathered, rows), strict=True)
        return answered

    def _finish(self, step: int, predictions: list[Prediction], started: float) -> Evaluated:
        assert self.scorer is not None
        sheet = self.run_dir / "samples" / f"step_{step:08d}.png"
        scored, lines = score(self.scorer, predictions, sheet.with_suffix(".jsonl"))
        for line in scored.summary:
            if line.startswith("warning: "):
                _warn(f"step {step}: {line.removeprefix('warning: ')}")
        best = SCORE[self.questions.task]
        if reason := scored.metrics.get("missing", {}).get(best):
            _warn(f"step {step}: without {best}, which decides the best checkpoint: {reason}")
        if reason := try_examples(self.questions.index, lines, sheet):
            _warn(f"step {step}: without {sheet.name}: {reason}")
        numbers = {f"eval/{name}": value for name, value in scored.numbers.items()}
        numbers["eval/seconds"] = time.perf_counter() - started
        shown = sheet if sheet.is_file() else None
        return Evaluated(score=scored.numbers.get(best), numbers=numbers, sheet=shown)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
