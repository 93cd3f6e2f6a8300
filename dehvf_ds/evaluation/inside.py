"""Answers and scores in the middle of a run, by a whole copy of the model on every rank."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dehvf_ds.config import InsideConfig, UserError
from dehvf_ds.distributed import World, all_reduce_sum, gather_to_main, on_main
from dehvf_ds.evaluation.questions import Questions
from dehvf_ds.evaluation.scores import Scored, draw_examples, score_answer_rows, score_caption_rows
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.loop import Evaluated
from dehvf_ds.training.replica import release_cache, whole_copy
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
    """

    config: InsideConfig
    questions: Questions
    model: DehvfForConditionalGeneration
    world: World
    run_dir: Path
    stop: StopRequest

    def __call__(self, step: int) -> Evaluated | None:
        """Evaluates the weights as they are. Every rank must call it.

        Scores that cannot be computed leave the run alive; it is said.

        Args:
            step: names the files.

        Returns:
            The numbers; None where the evaluation was ended early or nothing could be scored.

        Raises:
            UserError: a row cannot be read.
        """
        started = time.perf_counter()
        answered = self._answer()
        if all_reduce_sum([float(answered is None)], self.world.device)[0]:
            return None
        gathered = sorted(gather_to_main(answered or [], self.world), key=lambda pair: pair[0])

        def score() -> Evaluated | None:
            try:
                return self._score(step, [answer for _, answer in gathered], started)
            except (UserError, OSError) as error:
                print(
                    f"warning: step {step} not evaluated: {error}; the run goes on",
                    file=sys.stderr,
                    flush=True,
                )
                return None

        return on_main(self.world, score)

    def _answer(self) -> list[tuple[int, Any]] | None:
        """This rank's rows with their answers; None after a request to stop."""
        copy = whole_copy(self.model, self.world)
        rows = list(range(self.world.rank, self.questions.num_rows, self.world.size))
        answered: list[tuple[int, Any]] = []
        try:
            for start in range(0, len(rows), self.config.batch_size):
                if self.stop.requested:
                    return None
                group = rows[start : start + self.config.batch_size]
                answered += zip(group, self.questions.ask(copy, group), strict=True)
        finally:
            del copy
            release_cache(self.world)
        return answered

    def _score(self, step: int, answers: list[Any], started: float) -> Evaluated:
        questions = self.questions
        records = questions.records()
        if questions.task == "coco":
            scored = score_caption_rows(records, answers, tokenizer=self.config.tokenizer)
        else:
            scored = score_answer_rows(records, answers, name=f"step {step}")
        sheet = self.run_dir / "samples" / f"step_{step:08d}.png"
        draw_examples(questions.index, scored, sheet)
        _write_lines(sheet.with_suffix(".jsonl"), scored)
        numbers = {f"eval/{name}": value for name, value in scored.numbers.items()}
        numbers["eval/seconds"] = time.perf_counter() - started
        return Evaluated(score=scored.numbers.get(SCORE[questions.task]), numbers=numbers, sheet=sheet)


def _write_lines(path: Path, scored: Scored) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in scored.lines)
