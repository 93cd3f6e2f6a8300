"""Evaluations in the middle of a run, and ones that are killed."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from evaluation.tiny_data import captions, lines
from processes import REPOSITORY, run_ranks, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_entries import arguments, losses, read_metrics, start, steps

from dehvf_ds.config import EvalConfig, InTrainingConfig, UserError, parse_run_config
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.shards import DamagedSample
from dehvf_ds.distributed import World
from dehvf_ds.evaluation import in_training
from dehvf_ds.evaluation.coco import METRICS, CaptionScorer
from dehvf_ds.evaluation.dataset import Questions, published_shards
from dehvf_ds.evaluation.decode import Decoding
from dehvf_ds.evaluation.in_training import InTrainingEvaluation
from dehvf_ds.planning.estimate import check_evaluation_memory
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.metrics import Evaluated
from dehvf_ds.training.step import StopRequest

TRAIN = REPOSITORY / "dehvf_ds/train.py"
ALONE = World(0, 0, 1, 1, torch.device("cpu"))
INSIDE = ["--eval.every_steps", "2", "--eval.max_samples", "3", "--eval.max_new_tokens", "6"]
INSIDE += ["--eval.batch_size", "2", "--eval.tokenizer", "simple"]


@pytest.fixture(scope="module")
def evaluated_run(world: Path) -> tuple[Path, list[str]]:
    """A run of two ranks with dropout and in-training evaluations, and what its ranks printed."""
    more = ["--model.lora.dropout", "0.3", *INSIDE, "--eval.data", str(world / "test")]
    outputs = run_ranks(TRAIN, arguments(world, "evaluated", *more), 2)
    return world / "runs/evaluated", outputs


@pytest.mark.slow
def test_an_evaluation_changes_no_loss_and_decides_the_best(world: Path, evaluated_run) -> None:
    run, outputs = evaluated_run
    run_ranks(TRAIN, arguments(world, "calm", "--model.lora.dropout", "0.3"), 2)
    assert losses(world, "evaluated") == losses(world, "calm")
    found = steps(world, "evaluated")
    scored = {line["step"]: line["eval/CIDEr"] for line in found if "eval/CIDEr" in line}
    assert list(scored) == [2, 4]
    assert "CIDEr" in outputs[0]

    best = max(scored, key=lambda step: (scored[step], -step))
    assert (run / "checkpoints/best").read_text().strip() == f"step_{best:08d}"
    assert (run / "checkpoints" / f"step_{best:08d}").is_dir()
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("eval/examples")] == [2, 4]
    assert [event.value for event in events.Scalars("eval/CIDEr")] == pytest.approx(list(scored.values()))

    # The gathered model says what the saved one says.
    annotations = world / "scenes/annotations/captions_test.json"
    given = ["--model", str(run), "--data", str(annotations), "--images", str(world / "scenes/images/test")]
    given += ["--max_samples", "3", "--batch_size", "2", "--split", "test"]
    result = start("dehvf_ds/eval.py", [*given, "--max_new_tokens", "6", "--tokenizer", "simple"])
    assert result.returncode == 0, result.stderr
    metrics = read_metrics(run / "eval/caption-test")
    assert metrics["comparable"] is False
    assert metrics["CIDEr"] == pytest.approx(scored[4], abs=1e-3)
    outside = lines(run / "eval/caption-test/predictions.jsonl")
    assert lines(run / "samples/step_00000004.jsonl") == outside
    assert (run / "samples/step_00000004.png").stat().st_size > 1000


@pytest.mark.slow
def test_problems_are_answered_inside_a_run(world: Path) -> None:
    task = ["--data.task", "scienceqa", "--data.train", str(world / "scienceqa"), "--data.max_tokens", "400"]
    more = [*INSIDE, "--eval.data", str(world / "scienceqa"), "--train.steps", "2"]
    result = start("dehvf_ds/train.py", arguments(world, "problems", *task, *more))
    assert result.returncode == 0, result.stderr
    last = steps(world, "problems")[-1]
    assert 0 <= last["eval/parse_failure_rate"] <= 100
    answers = lines(world / "runs/problems/samples/step_00000002.jsonl")
    assert sum(line["choice"] == line["answer"] for line in answers) / 3 == last["eval/accuracy"] / 100


@pytest.mark.slow
def test_a_killed_evaluation_resumes_where_it_was(world: Path, evaluated_run, tmp_path: Path) -> None:
    given = ["--model", str(evaluated_run[0]), "--data", str(world / "train"), "--tokenizer", "simple"]
    given += ["--batch_size", "1", "--max_new_tokens", "60", "--min_new_tokens", "60"]
    script = REPOSITORY / "dehvf_ds/eval.py"
    processes = start_ranks(script, [*given, "--output", str(tmp_path / "killed")], 2)
    deadline = time.monotonic() + 120
    while sum(len(p.read_text().splitlines()) for p in tmp_path.glob("killed/*/.answers-*/rank-*")) < 3:
        assert time.monotonic() < deadline, processes[0].communicate()[0]
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    again = start("dehvf_ds/eval.py", [*given, "--output", str(tmp_path / "killed")])
    calm = start("dehvf_ds/eval.py", [*given, "--output", str(tmp_path / "calm")])
    assert again.returncode == calm.returncode == 0, again.stderr
    assert ["resuming after" in done.stdout for done in (again, calm)] == [True, False]
    read_metrics(tmp_path / "killed/caption-train")
    read = [(tmp_path / name / "caption-train/predictions.jsonl").read_text() for name in ("killed", "calm")]
    assert read[0] == read[1]
    assert not list(tmp_path.rglob(".answers-*"))


def test_scienceqas_directory_becomes_the_shards_of_the_same_rows(world: Path, tmp_path: Path) -> None:
    def build(split: str | None) -> ShardIndex:
        config = EvalConfig(model="none", data=str(world / "scenes/scienceqa"), task="scienceqa", split=split)
        return ShardIndex(published_shards(config, tmp_path / "shards"))

    found, wanted = build("train"), ShardIndex(world / "scienceqa")
    keys = [[index.read(row)["__key__"] for row in range(len(index))] for index in (found, wanted)]
    assert keys[0] == keys[1]
    # Built once; another split goes into another directory.
    assert build("train").directory == found.directory != build("test").directory
    with pytest.raises(UserError, match="name one with --split"):
        build(None)


def test_an_evaluation_that_does_not_fit_is_refused_with_its_numbers(world: Path, monkeypatch) -> None:
    config = parse_run_config(arguments(world, "big", *INSIDE, "--eval.data", str(world / "test")))
    ds_config = read_deepspeed_json(config.deepspeed, config, 1, 1)
    check_evaluation_memory(config, ds_config, ALONE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(
        UserError, match=r"the full model 0\.0, decoding 2 rows 0\.0 make .* GiB a rank, and 0\.0"
    ):
        check_evaluation_memory(config, ds_config, ALONE)


class Evaluation:
    """Evaluates three rows, the second unreadable; every answer is the same."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.said = root / "run/samples/step_00000007.jsonl"
        self.data = captions(root / "data", ["a dog", "a cat", "a cow"], broken=(1,))
        self.stop = StopRequest()
        monkeypatch.setattr(in_training, "full_model", lambda model, world: nullcontext(model))
        monkeypatch.setattr(Questions, "_answer", lambda self, model, samples: ["a dog"] * len(samples))
        without_java = {names: score for names, score in METRICS.items() if names[0] != "METEOR"}
        monkeypatch.setattr("dehvf_ds.evaluation.coco.METRICS", without_java)

    def run(self, num_rows: int = 3) -> Evaluated | None:
        unused: Any = None
        questions = Questions(
            task="caption",
            index=ShardIndex(self.data),
            num_rows=num_rows,
            collator=cast(Any, SimpleNamespace(image_size=8)),
            targets=unused,
            tokenizer=unused,
            decoding=Decoding(max_new_tokens=2),
        )
        config = InTrainingConfig(every_steps=1, batch_size=1, tokenizer="simple")
        evaluation = InTrainingEvaluation(config, questions, ALONE, self.said.parents[1])
        evaluation.open()
        return evaluation(unused, 7, self.stop)


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch) -> Evaluation:
    return Evaluation(tmp_path, monkeypatch)


def test_an_unreadable_picture_counts_as_an_empty_answer_and_one_row_decides_no_best(
    evaluation, capsys
) -> None:
    found = evaluation.run()
    assert found.numbers["eval/num_unreadable"] == 1
    assert found.numbers["eval/ROUGE-L"] < 100
    assert [line["prediction"] for line in lines(evaluation.said)] == ["a dog", "", "a dog"]
    assert "warning: step 7: 1 of 3 pictures could not be read" in capsys.readouterr().err
    found = evaluation.run(num_rows=1)
    assert (found.score, "eval/CIDEr" in found.numbers) == (None, False)
    assert "step 7: without CIDEr, which decides the best checkpoint" in capsys.readouterr().err


def test_a_request_to_stop_ends_the_evaluation(evaluation, monkeypatch) -> None:
    asked = []

    def ask(questions: Questions, model: object, rows: list[int]) -> list[str]:
        asked.extend(rows)
        evaluation.stop.requested = len(asked) == 2
        return ["a"]

    monkeypatch.setattr(Questions, "ask", ask)
    assert evaluation.run() is None
    assert asked == [0, 1]
    assert not evaluation.said.exists()


def test_a_shard_that_cannot_be_read_leaves_the_run_alive(evaluation, monkeypatch, capsys) -> None:
    read, rows = ShardIndex.read, []

    def gone(index: ShardIndex, row: int) -> dict:
        rows.append(row)
        # The first three are the records, before the first step.
        if row == 2 and len(rows) > 3:
            raise DamagedSample("x.tar: cannot be read: the network is down")
        return read(index, row)

    monkeypatch.setattr(ShardIndex, "read", gone)
    assert evaluation.run() is None
    reason = "step 7 not evaluated: rank 0: x.tar: cannot be read: the network is down; the run goes on"
    assert reason in capsys.readouterr().err


def test_what_fails_after_decoding_leaves_the_run_alive(evaluation, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("dehvf_ds.evaluation.evaluate.contact_sheet", fail)
    assert evaluation.run().sheet is None
    assert "warning: step 7: without step_00000007.png: MemoryError: too large" in capsys.readouterr().err
    monkeypatch.setattr(CaptionScorer, "score", fail)
    assert evaluation.run() is None
    assert "warning: step 7 not evaluated: too large; the run goes on" in capsys.readouterr().err
    assert len(lines(evaluation.said)) == 3
