"""Evaluations in this process: where they lie, what they refuse, and what they survive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluation.tiny_data import PROBLEM, annotations, captions, lines, picture, problems
from PIL import Image
from tiny_artifacts import build_bases, save, trained_model

from dehvf_ds import eval as program
from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.evaluation.coco import METRICS, CaptionScorer
from dehvf_ds.evaluation.dataset import Questions
from dehvf_ds.evaluation.evaluate import finish
from dehvf_ds.model import DehvfForConditionalGeneration


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models of two tasks over the same bases, and shards."""
    root = tmp_path_factory.mktemp("eval")
    bases = build_bases(root, max_position_embeddings=1000)
    for task in ("caption", "scienceqa", "chat"):
        save(
            trained_model(bases, task=task, prompt="Say:" if task == "caption" else None), bases, root / task
        )
    save(trained_model(bases, scale=0.4, task="caption", prompt="Say:"), bases, root / "other")
    captions(root / "a/test", ["a red dog", "two blue cats"])
    captions(root / "b/test", ["a green cow", "one grey bird", "no horse"])
    problems(root / "sqa", [PROBLEM, PROBLEM | {"question": "Who?", "answer": 0}])
    problems(root / "pictured", [PROBLEM | {"image": "image.png"}, PROBLEM])
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """This process keeps its signal handlers, is no group, and starts no Java."""
    monkeypatch.setattr(program, "exit_on_signal", lambda: None)
    monkeypatch.setattr("dehvf_ds.evaluation.evaluate.init_process_group", lambda world: None)
    without_java = {names: score for names, score in METRICS.items() if names[0] not in ("METEOR", "SPICE")}
    monkeypatch.setattr("dehvf_ds.evaluation.coco.METRICS", without_java)


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "caption", tmp_path / "run/adapter").parent


def evaluate(model: Path, data: object, *more: str) -> None:
    given = ["--model", str(model), "--data", str(data), "--max_new_tokens", "4", "--tokenizer", "simple"]
    assert program.main([*given, *more]) == 0


def results(model: Path) -> dict[str, dict]:
    """What ``eval/`` holds, by directory."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((model / "eval").glob("*/metrics.json"))
    }


def said(model: Path, name: str = "coco-test") -> list[dict]:
    return lines(model / "eval" / name / "predictions.jsonl")


class Told:
    """What an evaluation asked the model."""

    def __init__(self, monkeypatch) -> None:
        self.rows: list[int] = []
        self.dies_after: int | None = None
        ask = Questions.ask

        def told(questions: Questions, model: DehvfForConditionalGeneration, rows):
            if self.dies_after is not None and len(self.rows) >= self.dies_after:
                raise KeyboardInterrupt
            self.rows += rows
            return ask(questions, model, rows)

        monkeypatch.setattr(Questions, "ask", told)


@pytest.fixture
def told(monkeypatch) -> Told:
    return Told(monkeypatch)


class TestPlaces:
    def test_two_data_sets_of_one_name_have_a_place_each(self, root, model, capsys) -> None:
        evaluate(model, root / "a/test")
        evaluate(model, root / "b/test")
        evaluate(model, root / "a/test")
        found = results(model)
        assert len(found) == 2
        assert found.pop("coco-test")["num_samples"] == 2
        ((name, other),) = found.items()
        assert other["num_samples"] == 3
        assert [line["key"] for line in said(model, name)] == ["000", "001", "002"]
        printed = capsys.readouterr()
        assert f"metrics: {model / 'eval' / name / 'metrics.json'}" in printed.out
        assert printed.err.count(f"this evaluation is written to {name}") == 1

    def test_however_a_directory_is_spelt_it_is_the_same_evaluation(
        self, root, model, told, tmp_path, monkeypatch
    ) -> None:
        data = captions(tmp_path / "data/val.2017", ["a dog", "a cat"])
        (tmp_path / "link").symlink_to(data)
        monkeypatch.chdir(data)
        spellings = [".", "../val.2017", f"{data}/", f"{data}/../val.2017/.", tmp_path / "link", data]
        for number, spelling in enumerate(spellings):
            told.rows, told.dies_after = [], 1 if number == 0 else None
            if number == 0:
                with pytest.raises(KeyboardInterrupt):
                    evaluate(model, spelling, "--batch_size", "1")
            else:
                evaluate(model, spelling, "--batch_size", "1")
            # The second call takes up the first one's row.
            assert len(told.rows) == (1 if number < 2 else 2)
        assert list(results(model)) == ["coco-val.2017"]
        assert not list(model.rglob(".answers-*"))

    @pytest.mark.parametrize("split", ["../../up", "train+restval", ".", "", "ä 犬 %", "x" * 300, "a\nb"])
    def test_a_splits_name_is_one_directory(self, root, model, split: str) -> None:
        evaluate(model, root / "a/test", f"--split={split}", "--max_samples", "1")
        (found,) = results(model).values()
        assert found["protocol"]["split"] == split
        assert {path.parent.name for path in model.parent.rglob("metrics.json")} == set(results(model))

    def test_other_settings_take_no_answers_and_overwrite_none(self, root, model, told, tmp_path) -> None:
        references = annotations(tmp_path / "references.json", ["0.png", "1.png"])
        told.dies_after = 1
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, root / "a/test", "--batch_size", "1")
        settings = [
            ("--prompt", "Other:"),
            ("--prompt", ""),
            ("--num_beams", "2"),
            ("--max_new_tokens", "3"),
            ("--min_new_tokens", "4"),
            ("--max_samples", "1"),
            ("--dtype", "bf16"),
            ("--references", str(references)),
        ]
        told.dies_after = None
        for more in settings:
            told.rows = []
            evaluate(model, root / "a/test", *more)
            assert sorted(told.rows) == ([0] if more[0] == "--max_samples" else [0, 1])
        told.rows = []
        evaluate(model, root / "a/test", "--batch_size", "1")
        assert told.rows == [1]
        found = results(model)
        assert len(found) == 1 + len(settings)
        assert found["coco-test"]["protocol"]["prompt"] == "Say:"
        assert found["coco-test"]["decoding"]["num_beams"] == 1
        evaluate(model, root / "a/test", *settings[2])
        assert results(model) == found

    def test_models_that_share_an_output_do_not_overwrite_each_other(self, root, model, tmp_path) -> None:
        for name in ("caption", "other", "caption"):
            evaluate(root / name, root / "a/test", "--output", str(tmp_path / "eval"))
        found = results(tmp_path)
        assert {Path(metrics["model"]["path"]).name for metrics in found.values()} == {"caption", "other"}

    def test_what_was_made_anew_at_the_same_place_replaces_its_results(
        self, root, model, told, tmp_path, capsys
    ) -> None:
        data = captions(tmp_path / "test", ["a dog", "a cat"])
        evaluate(model, data)
        # Trained on, and killed in its evaluation, twice.
        for source in ("other", "caption"):
            shutil.rmtree(model / "adapter")
            shutil.copytree(root / source, model / "adapter")
            told.rows, told.dies_after = [], 1
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, data, "--batch_size", "1")
        told.rows, told.dies_after = [], None
        shutil.rmtree(data)
        captions(data, ["a horse", "a cow"])
        evaluate(model, data)
        assert list(results(model)) == ["coco-test"]
        assert said(model)[0]["references"][0] == "a horse"
        assert len(told.rows) == 2
        assert "results of an earlier model or earlier data are replaced" in capsys.readouterr().err
        assert not list(model.rglob(".answers-*"))


class TestUnreadable:
    def test_a_caption_counts_as_empty_and_is_told(self, root, model, tmp_path, capsys) -> None:
        data = captions(tmp_path / "test", ["a dog", "a cat", "a cow", "a hen"], broken=(1, 2))
        evaluate(model, data, "--loss", "true")
        metrics = results(model)["coco-test"]
        assert metrics["num_unreadable"] == 2
        assert list(metrics["unreadable"]) == ["001", "002"]
        assert "not a readable picture" in metrics["unreadable"]["001"]
        assert metrics["num_empty"] >= 2
        assert metrics["loss"] > 0
        assert metrics["loss_num_left_out"] == 4
        found = said(model)
        assert [line["prediction"] == "" for line in found] == [False, True, True, False]
        assert [line["key"] for line in found if "unreadable" in line] == ["001", "002"]
        told = capsys.readouterr().out
        assert "warning: 2 of 4 pictures could not be read and count as empty answers: 001, 002" in told
        with Image.open(model / "eval/coco-test/examples.png") as sheet:
            assert sheet.width > 500

    def test_a_problem_names_no_choice(self, root, tmp_path) -> None:
        with_picture = PROBLEM | {"image": "image.png"}
        data = problems(tmp_path / "test", [with_picture, PROBLEM, with_picture], broken=(0,))
        given = ["--task", "scienceqa", "--output", str(tmp_path / "eval"), "--reading", "likelihood"]
        evaluate(root / "scienceqa", data, *given)
        metrics = results(tmp_path)["scienceqa-test"]
        assert metrics["num_unreadable"] == 1
        assert metrics["num_problems"]["IMG"] == 2
        assert metrics["accuracy"]["SOC"] is None
        assert metrics["num_parse_failures"] >= 1
        assert said(tmp_path, "scienceqa-test")[0]["choice"] is None

    def test_nothing_readable_is_no_evaluation(self, root, model, tmp_path) -> None:
        data = captions(tmp_path / "test", ["a dog", "a cat"], broken=(0, 1))
        with pytest.raises(UserError, match=r"none of the 2 rows could be read: .*predictions\.jsonl"):
            evaluate(model, data)
        assert not results(model)


def test_damaged_text_does_not_end_an_evaluation(root, tmp_path) -> None:
    texts = ["half \ud83d a dog", "a cat ||| x\n\ty", "nul \x00 \x85 \u2028 a cow"]
    records = [(f"{i}\udcff", {"captions": [text]}) for i, text in enumerate(texts)]
    scorer = CaptionScorer(records, tokenizer="simple")
    report = {"protocol": {"prompt": "\ud83d"}, "model": {"path": "\udcff"}}
    finish(tmp_path, scorer, [text.upper() for text in texts], report, ShardIndex(root / "b/test"))
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    assert [line["references"] for line in found] == [[text] for text in texts]
    assert [line["key"] for line in found] == [key for key, _ in records]
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["model"] == report["model"]
    assert metrics["ROUGE-L"] == pytest.approx(100)
    assert (tmp_path / "examples.png").stat().st_size > 1000


def test_examples_that_cannot_be_drawn_fail_alone(root, model, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("dehvf_ds.evaluation.evaluate.contact_sheet", fail)
    evaluate(model, root / "a/test")
    assert "without examples.png: MemoryError: too large" in capsys.readouterr().out
    assert len(said(model)) == 2
    assert results(model)["coco-test"]["CIDEr"] is not None


def test_scores_that_fail_lose_no_answer(root, model, monkeypatch, told) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("dehvf_ds.evaluation.coco.METRICS", {("ROUGE-L",): fail})
        with pytest.raises(UserError, match=r"metric could .*; no room; the answers are kept in"):
            evaluate(model, root / "a/test")
    assert len(said(model)) == 2
    evaluate(model, root / "a/test")
    assert sorted(told.rows) == [0, 1]
    assert results(model)["coco-test"]["CIDEr"] is not None


def test_a_loss_of_nothing_is_no_number(root, model, capsys) -> None:
    evaluate(model, root / "a/test", "--loss", "true", "--prompt", "x" * 600)
    metrics = results(model)["coco-test"]
    assert metrics["loss"] is None
    assert metrics["loss_num_left_out"] == 4
    assert "without loss: no token of these rows is supervised" in capsys.readouterr().out


def test_rows_are_scored_against_a_file_by_their_pictures_names(root, model, tmp_path) -> None:
    # In another order, with pictures that are not asked, and their keys no part of the names.
    path = annotations(tmp_path / "references.json", ["9.png", "1.png", "0.png"])
    evaluate(model, root / "a/test", "--references", str(path))
    expected = [[f"a text of {i}.png", f"a text of {i}.png!"] for i in range(2)]
    assert [line["references"] for line in said(model)] == expected
    with pytest.raises(UserError, match=r"lack 1 of 3 evaluated pictures, val/2\.png"):
        evaluate(model, root / "b/test", "--references", str(path))


SCIENCE = ["--task", "scienceqa"]
MISTAKES = [
    ("caption", "nowhere", [], "nowhere: no such directory"),
    ("caption", "llm", [], r"manifest\.json: no such file; build shards"),
    ("caption", "llm/config.json", [], "config.json: not COCO captions"),
    ("caption", "a/test/x-000000.tar", [], r"x-000000\.tar: no such directory.*; build shards"),
    ("caption", "sqa", [], "holds rows without captions, which .* need --task scienceqa"),
    ("scienceqa", "a/test", SCIENCE, "holds captions, which .* need --task coco"),
    ("scienceqa", "a/test", [], "trained for scienceqa, and --task coco .* pass --task scienceqa"),
    ("caption", "sqa", SCIENCE, "trained for caption, and --task scienceqa .* pass --task coco"),
    ("scienceqa", "sqa", [*SCIENCE, "--references", "x.json"], "references is for task coco, not"),
    ("scienceqa", "pictured", [*SCIENCE, "--image_captions", "true"], "problems of .* have no captions"),
    ("caption", "a/test", ["--references", "nowhere.json"], r"nowhere\.json: no such file"),
    ("caption", "a/test", ["--reading", "likelihood"], "reading likelihood is ScienceQA's"),
    ("caption", "a/test", ["--image_captions", "true"], "image_captions is for task scienceqa"),
    ("caption", "a/test", ["--images", "x"], "images is for annotation files"),
    ("caption", "a/test", ["--max_new_tokens=null", "--min_new_tokens=50"], "the longest answer, 40 tokens"),
    ("caption", "a/test", ["--output", "{root}/llm/config.json"], "config.json: (Not a dir|File exists)"),
]


@pytest.mark.parametrize(("model", "data", "more", "message"), MISTAKES)
def test_mistakes_are_named_before_decoding(root, told, tmp_path, model, data, more, message) -> None:
    more = [word.format(root=root) for word in more]
    given = [*([] if "--output" in more else ["--output", str(tmp_path)]), *more]
    with pytest.raises(UserError, match=message) as error:
        evaluate(root / model, root / data, *given)
    assert "\n" not in str(error.value)
    assert told.rows == []


def test_a_question_in_an_unseen_form_is_asked_with_a_warning(root, tmp_path, capsys) -> None:
    evaluate(root / "chat", root / "a/test", "--prompt", "Caption:", "--output", str(tmp_path / "eval"))
    assert "warning: the model was trained for chat, and --task coco" in capsys.readouterr().err


def test_published_files_of_one_name_have_shards_each(root, model, tmp_path) -> None:
    names = ["0 ä%.png", "1 ä%.png"]
    for folder in "abc":
        (tmp_path / folder).mkdir()
        annotations(tmp_path / folder / "captions.json", names, folder)
        for i, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(picture(i + ord(folder)))
    for folder in "aba":
        evaluate(model, tmp_path / folder / "captions.json")
    found = results(model)
    assert len(found) == 2
    assert said(model, "coco-captions")[1]["references"][0] == "a of 1 ä%.png"
    (other,) = found.keys() - {"coco-captions"}
    assert said(model, other)[1]["references"][0] == "b of 1 ä%.png"
    # The same annotations over other pictures.
    evaluate(model, tmp_path / "a/captions.json", "--images", str(tmp_path / "c"))
    assert len({metrics["data"]["sha256"] for metrics in results(model).values()}) == 3


def test_no_answer_is_longer_than_the_decoder_has_positions_for(root, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dehvf_ds.model.adapter.TrainedModel.load", None)  # before weights load
    given = ["--max_new_tokens", "100000"]
    with pytest.raises(UserError, match=r"max_new_tokens 100000 behind a prompt of 4 is more than the 1000"):
        evaluate(model, root / "a/test", *given)
    # The longest of all prompts counts.
    rows = problems(tmp_path / "rows", [PROBLEM, PROBLEM | {"question": "Which? " * 200}, PROBLEM])
    with pytest.raises(UserError, match=r"max_new_tokens 4 behind a prompt of \d{4} is"):
        evaluate(root / "scienceqa", rows, "--task", "scienceqa")
    assert not (model / "eval").exists()
