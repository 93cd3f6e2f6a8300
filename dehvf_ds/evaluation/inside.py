"""Answers and scores in the middle of a run, by a whole copy of the model on every rank."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from dehvf_ds.config import InsideConfig, UserError
from dehvf_ds.data.loader import read_sample
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.questions import TASKS, Questions, open_questions
from dehvf_ds.evaluation.scores import AnswerScorer, CaptionScorer, open_scorer
from dehvf_ds.evaluation.writing import try_examples, write_lines
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.full_model import full_model
from dehvf_ds.training.metrics import Evaluated
from dehvf_ds.training.run import ResolvedRun
from dehvf_ds.training.stop import StopRequest

SCORE = {"coco": "CIDEr", "scienceqa": "accuracy"}
"""The number that tells which checkpoint is the best, the higher the better."""


class InsideEvaluation:
    """Asks a fixed set of rows, scores the answers and draws examples.

    Args:
        config: sizes of the evaluation.
        questions: what is asked.
        world: this process's place.
        run_dir: pictures and answers are written into its ``samples``.
        data: where the rows lie, for messages.
    """

    def __init__(
        self, config: InsideConfig, questions: Questions, world: World, run_dir: Path, data: str = ""
    ) -> None:
        self.config, self.questions, self.world = config, questions, world
        self.run_dir, self.data = run_dir, data
        self.scorer: CaptionScorer | AnswerScorer | None = None

    @classmethod
    def of_run(cls, run: ResolvedRun) -> InsideEvaluation | None:
        """Opens the rows that a run evaluates on; None where it evaluates nothing.

        Raises:
            UserError: they are of another task, or Java is missing.
        """
        config, settings = run.config, run.config.eval
        data = settings.data or config.data.val
        if not settings.every_steps or data is None:
            return None
        questions = open_questions(
            data,
            TASKS[config.data.task],
            run.tokenizer,
            run.transform,
            prompt=run.model_config.prompt,
            scienceqa=config.data.scienceqa,
            caption_tokenizer=settings.tokenizer,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            max_samples=settings.max_samples,
        )
        questions.require_positions(run.model_config)
        return cls(settings, questions, run.world, Path(config.run_dir), data)

    def open(self) -> None:
        """Looks at the rows' records before the first step. Every rank must call it.

        Raises:
            UserError: a row could not be scored.
        """
        on_main(self.world, self._open_scorer)

    def describe(self) -> str:
        """Opens the scorer and says in one line what is asked. Rank 0 alone."""
        self._open_scorer()
        num_tokens = self.questions.collator([read_sample(self.questions.index, 0)]).input_ids.shape[1]
        return (
            f"{self.data}: {self.questions.num_rows} rows asked every {self.config.every_steps} steps, "
            f"the first in {num_tokens} tokens"
        )

    def _open_scorer(self) -> None:
        name = self.run_dir.resolve().name
        self.scorer = open_scorer(self.questions, name=name, tokenizer=self.config.tokenizer)

    def __call__(
        self, model: DehvfForConditionalGeneration, step: int, stop: StopRequest
    ) -> Evaluated | None:
        """Evaluates the weights as they are. Every rank must call it.

        A picture that cannot be read counts as an empty answer. Scores that cannot be computed leave the run
        alive; both are said.

        Args:
            model: the model inside the engine; it is copied and not changed.
            step: names the files.
            stop: a request to stop; all ranks end the evaluation together.

        Returns:
            The numbers; None where the evaluation was ended early or nothing could be scored.
        """
        started = time.perf_counter()
        try:
            answered = self._answer(model, stop)
        except UserError as error:
            _warn(f"step {step} not evaluated: rank {self.world.rank}: {error}; the run goes on")
            answered = None
        if all_reduce_sum([float(answered is None)], self.world.device)[0]:
            return None
        gathered = sorted(gather_to_main(answered or [], self.world), key=lambda pair: pair[0])

        def score() -> Evaluated | None:
            try:
                return self._score(step, [answer for _, answer in gathered], started)
            # Whatever it is, the other ranks wait, and the training is worth more.
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                _warn(f"step {step} not evaluated: {reason}; the run goes on")
                return None

        return on_main(self.world, score)

    def _answer(
        self, model: DehvfForConditionalGeneration, stop: StopRequest
    ) -> list[tuple[int, Any]] | None:
        """This rank's rows with their answers; None after a request to stop."""
        rows = list(range(self.world.rank, self.questions.num_rows, self.world.size))
        answered: list[tuple[int, Any]] = []
        with full_model(model, self.world) as whole:
            for start in range(0, len(rows), self.config.batch_size):
                if stop.requested:
                    return None
                group = rows[start : start + self.config.batch_size]
                answered += zip(group, self.questions.ask(whole, group), strict=True)
        return answered

    def _score(self, step: int, answers: list[Any], started: float) -> Evaluated:
        questions, scorer = self.questions, self.scorer
        assert scorer is not None
        sheet = self.run_dir / "samples" / f"step_{step:08d}.png"
        # The answers first, which cost the most.
        write_lines(sheet.with_suffix(".jsonl"), scorer.lines(answers))
        scored = scorer.score(answers)
        write_lines(sheet.with_suffix(".jsonl"), scored.lines)
        for line in scored.summary:
            if line.startswith("warning: "):
                _warn(f"step {step}: {line.removeprefix('warning: ')}")
        best = SCORE[questions.task]
        if reason := scored.metrics.get("missing", {}).get(best):
            _warn(f"step {step}: without {best}, which tells the best checkpoint: {reason}")
        if reason := try_examples(questions.index, scored, sheet):
            _warn(f"step {step}: without {sheet.name}: {reason}")
        numbers = {f"eval/{name}": value for name, value in scored.numbers.items()}
        numbers["eval/seconds"] = time.perf_counter() - started
        return Evaluated(
            score=scored.numbers.get(best), numbers=numbers, sheet=sheet if sheet.is_file() else None
        )


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
