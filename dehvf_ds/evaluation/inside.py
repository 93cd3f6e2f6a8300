"""Answers and scores in the middle of a run, by a whole copy of the model on every rank."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dehvf_ds.config import InsideConfig, UserError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.questions import Questions
from dehvf_ds.evaluation.scores import AnswerScorer, CaptionScorer, open_scorer
from dehvf_ds.evaluation.writing import try_examples, write_lines
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.loop import Evaluated
from dehvf_ds.training.replica import whole_model
from dehvf_ds.training.signals import StopRequest

SCORE = {"coco": "CIDEr", "scienceqa": "accuracy"}
"""The number that tells which checkpoint is the best, the higher the better."""


@dataclass(frozen=True, kw_only=True)
class InsideEvaluation:
    """Asks a fixed set of rows, scores the answers and draws examples.

    Attributes:
        config: sizes of the evaluation.
        questions: what is asked.
        model: the model inside the engine; it is copied and not changed.
        world: this process's place.
        run_dir: pictures and answers are written into its ``samples``.
        stop: a request to stop; all ranks end the evaluation together.
        scorer: on rank 0 alone.
    """

    config: InsideConfig
    questions: Questions
    model: DehvfForConditionalGeneration
    world: World
    run_dir: Path
    stop: StopRequest
    scorer: CaptionScorer | AnswerScorer = field(init=False)

    def __post_init__(self) -> None:
        """Looks at the rows' records before the first step. Every rank must construct it.

        Raises:
            UserError: a row could not be scored.
        """
        name = self.run_dir.resolve().name

        def open_it() -> None:
            scorer = open_scorer(self.questions, name=name, tokenizer=self.config.tokenizer)
            object.__setattr__(self, "scorer", scorer)

        on_main(self.world, open_it)

    def __call__(self, step: int) -> Evaluated | None:
        """Evaluates the weights as they are. Every rank must call it.

        A picture that cannot be read counts as an empty answer. Scores that cannot be computed leave the run
        alive; both are said.

        Args:
            step: names the files.

        Returns:
            The numbers; None where the evaluation was ended early or nothing could be scored.
        """
        started = time.perf_counter()
        try:
            answered = self._answer()
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

    def _answer(self) -> list[tuple[int, Any]] | None:
        """This rank's rows with their answers; None after a request to stop."""
        rows = list(range(self.world.rank, self.questions.num_rows, self.world.size))
        answered: list[tuple[int, Any]] = []
        with whole_model(self.model, self.world) as whole:
            for start in range(0, len(rows), self.config.batch_size):
                if self.stop.requested:
                    return None
                group = rows[start : start + self.config.batch_size]
                answered += zip(group, self.questions.ask(whole, group), strict=True)
        return answered

    def _score(self, step: int, answers: list[Any], started: float) -> Evaluated:
        questions = self.questions
        sheet = self.run_dir / "samples" / f"step_{step:08d}.png"
        # The answers first, which cost the most.
        write_lines(sheet.with_suffix(".jsonl"), self.scorer.lines(answers))
        scored = self.scorer.score(answers)
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
