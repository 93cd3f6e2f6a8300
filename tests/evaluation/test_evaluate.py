"""Evaluations in this process: where they lie, what they refuse, and what they survive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation.tiny_data import PROBLEM, annotations, captions, lines, picture, problems
from PIL import Image
from tiny_artifacts import build_bases, save, trained_model

from dehvf_ds import eval as program
from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.evaluation import evaluate as evaluation
from dehvf_ds.evaluation.coco import METRICS, CaptionScorer
from dehvf_ds.evaluation.dataset import Questions
from dehvf_ds.model import DehvfForConditionalGeneration


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Models of each task over the same bases, and shards."""
    root = tmp_path_factory.mktemp("eval")
    bases = build_bases(root, max_position_embeddings=1000)
    for name, task, scale in (
        *(("caption", "caption", 0.3), ("other", "caption", 0.4)),
        *(("scienceqa", "scienceqa", 0.3), ("chat", "chat", 0.3)),
    ):
        prompt = "Say:" if task == "caption" else None
        save(trained_model(bases, scale=scale, task=task, prompt=prompt), bases, root / name)
    captions(root / "a/test", ["a red dog", "two blue cats"])
    captions(root / "b/test", ["a green cow", "one grey bird", "no horse"])
    problems(root / "sqa", [PROBLEM, PROBLEM | {"question": "Who?", "answer": 0}])
    annotations(root / "two.json", ["1.png", "0.png"])
    problems(root / "pictured", [PROBLEM | {"image": "image.png"}, PROBLEM])
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """This process keeps its signal handlers, joins no group, and starts no Java."""
    monkeypatch.setattr(program, "exit_on_signal", lambda: None)
    monkeypatch.setattr(evaluation, "init_process_group", lambda world: None)
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


def said(model: Path, name: str = "caption-test") -> list[dict]:
    return lines(model / "eval" / name / "predictions.jsonl")


class Asked:
    """The rows that the model is asked; an evaluation may die after some."""

    def __init__(self, monkeypatch) -> None:
        self.rows: list[int] = []
        self.dies_after: int | None = None
        ask = Questions.ask

        def watched(questions: Questions, model: DehvfForConditionalGeneration, rows):
            if self.dies_after is not None and len(self.rows) >= self.dies_after:
                raise KeyboardInterrupt
            self.rows += rows
            return ask(questions, model, rows)

        monkeypatch.setattr(Questions, "ask", watched)

    def by(self, model: Path, data: object, *more: str, dies_after: int | None = None) -> list[int]:
        """The rows that an evaluation asks."""
        self.rows, self.dies_after = [], dies_after
        if dies_after is None:
            evaluate(model, data, *more)
        else:
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, data, "--batch_size", "1", *more)
        return sorted(self.rows)


@pytest.fixture
def asked(monkeypatch) -> Asked:
    return Asked(monkeypatch)


def test_however_a_directory_is_spelt_it_is_the_same_evaluation(model, asked, tmp_path, monkeypatch) -> None:
    data = captions(tmp_path / "data/val.2017", ["a dog", "a cat"])
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data)
    assert asked.by(model, ".", dies_after=1) == [0]
    # Resumes the first one.
    assert asked.by(model, "../val.2017") == [1]
    for spelling in (f"{data}/", tmp_path / "link"):
        assert asked.by(model, spelling) == [0, 1]
    assert list(results(model)) == ["caption-val.2017"]
    assert not list(model.rglob(".answers-*"))


@pytest.mark.parametrize("split", ["../../up", "", "ä 犬 %\n", "x" * 300])
def test_a_splits_name_is_one_directory(root, model, split: str) -> None:
    evaluate(model, root / "a/test", f"--split={split}", "--max_samples", "1")
    (found,) = results(model).values()
    assert found["protocol"]["split"] == split
    assert {path.parent.name for path in model.parent.rglob("metrics.json")} == set(results(model))


def test_other_settings_and_other_data_take_no_answers_and_overwrite_none(
    root, model, asked, tmp_path, capsys
) -> None:
    references = annotations(tmp_path / "references.json", ["9.png", "1.png", "0.png"])
    assert asked.by(model, root / "a/test", dies_after=1) == [0]
    settings = [
        ("--prompt", "Other:"),
        ("--prompt", ""),
        ("--num_beams", "2"),
        ("--max_new_tokens", "3"),
        ("--min_new_tokens", "4"),
        ("--dtype", "bf16"),
        ("--references", str(references)),
    ]
    for more in settings:
        assert asked.by(model, root / "a/test", *more) == [0, 1]
    name = Path(capsys.readouterr().out.splitlines()[-1]).parent.name
    assert [line["references"] for line in said(model, name)] == [
        [f"a text of {i}.png", f"a text of {i}.png!"] for i in range(2)
    ]
    assert asked.by(model, root / "a/test", "--max_samples", "1") == [0]
    assert asked.by(model, root / "b/test") == [0, 1, 2]
    assert "; this evaluation is written to caption-test-" in capsys.readouterr().err
    assert asked.by(model, root / "a/test") == [1]
    found = results(model)
    assert len(found) == 3 + len(settings)
    assert found["caption-test"]["protocol"]["prompt"] == "Say:"
    assert found["caption-test"]["decoding"]["num_beams"] == 1
    evaluate(model, root / "a/test", *settings[2])
    assert results(model) == found
    # Nor do two models that share an output.
    for name in ("caption", "other", "caption"):
        evaluate(root / name, root / "a/test", "--output", str(tmp_path / "eval"))
    shared = results(tmp_path).values()
    assert {Path(metrics["model"]["path"]).name for metrics in shared} == {"caption", "other"}


def test_a_model_or_data_that_changed_at_its_place_replaces_the_results(
    root, model, asked, tmp_path, capsys
) -> None:
    data = captions(tmp_path / "test", ["a dog", "a cat"])
    evaluate(model, data)
    # Trained further, and killed in its evaluation, twice.
    for source in ("other", "caption"):
        shutil.rmtree(model / "adapter")
        shutil.copytree(root / source, model / "adapter")
        asked.by(model, data, dies_after=1)
    shutil.rmtree(data)
    captions(data, ["a horse", "a cow"])
    assert asked.by(model, data) == [0, 1]
    assert list(results(model)) == ["caption-test"]
    assert said(model)[0]["references"][0] == "a horse"
    assert "results of an earlier model or earlier data are replaced" in capsys.readouterr().err
    assert not list(model.rglob(".answers-*"))


def test_an_unreadable_picture_counts_as_an_empty_caption(model, tmp_path, capsys) -> None:
    data = captions(tmp_path / "test", ["a dog", "a cat", "a cow", "a hen"], broken=(1, 2))
    evaluate(model, data, "--loss", "true")
    metrics = results(model)["caption-test"]
    assert (metrics["num_unreadable"], metrics["loss_num_left_out"]) == (2, 4)
    assert "not a readable picture" in metrics["unreadable"]["001"]
    assert metrics["loss"] > 0
    found = said(model)
    assert [line["prediction"] == "" for line in found] == [False, True, True, False]
    assert ["unreadable" in line for line in found] == [False, True, True, False]
    warning = "warning: 2 of 4 pictures could not be read and count as empty answers: 001, 002"
    assert warning in capsys.readouterr().out
    shutil.rmtree(data)
    captions(data, ["a dog", "a cat"], broken=(0, 1))
    with pytest.raises(UserError, match=r"none of the 2 rows could be read: .*predictions\.jsonl"):
        evaluate(model, data, "--split", "none")
    assert list(results(model)) == ["caption-test"]


def test_damaged_text_does_not_end_an_evaluation(root, tmp_path) -> None:
    texts = ["half \ud83d a dog", "a cat ||| x\n\ty", "nul \x00 \x85 \u2028 a cow"]
    records = [(f"{i}\udcff", {"captions": [text]}) for i, text in enumerate(texts)]
    scorer = CaptionScorer(records, tokenizer="simple")
    report = {"protocol": {"prompt": "\ud83d"}, "model": {"path": "\udcff"}}
    evaluation.finish(tmp_path, scorer, [t.upper() for t in texts], report, ShardIndex(root / "b/test"))
    found = [
        (line["key"], {"captions": line["references"]}) for line in lines(tmp_path / "predictions.jsonl")
    ]
    assert found == records
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["model"], metrics["ROUGE-L"]) == (report["model"], pytest.approx(100))
    assert (tmp_path / "examples.png").stat().st_size > 1000


def fail(*_: object, **__: object) -> None:
    raise MemoryError("too large")


def test_what_fails_after_decoding_loses_no_answer(root, model, monkeypatch, asked, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dehvf_ds.evaluation.coco.METRICS", {("ROUGE-L",): fail})
        with pytest.raises(UserError, match=r"metric could .*: too large; the answers are kept in"):
            evaluate(model, root / "a/test")
    assert len(said(model)) == 2
    monkeypatch.setattr(evaluation, "contact_sheet", fail)
    evaluate(model, root / "a/test")
    assert sorted(asked.rows) == [0, 1]
    assert "without examples.png: MemoryError: too large" in capsys.readouterr().out
    assert results(model)["caption-test"]["CIDEr"] is not None


def test_a_loss_of_nothing_is_no_number(root, model, capsys) -> None:
    evaluate(model, root / "a/test", "--loss", "true", "--prompt", "x" * 600)
    metrics = results(model)["caption-test"]
    assert (metrics["loss"], metrics["loss_num_left_out"]) == (None, 4)
    assert "without loss: no token of these rows is supervised" in capsys.readouterr().out


def test_pictures_stand_above_their_texts_which_are_whole(tmp_path) -> None:
    red, blue = (200, 0, 0), (0, 0, 200)
    square, wide = Image.new("RGB", (50, 50), red), Image.new("RGB", (500, 250), blue)
    long = "a striped circle and pneumonoultramicroscopicsilicovolcanoconiosis"
    evaluation.contact_sheet(
        [(square, long, "Hill"), (wide, "ill", ""), *[(square, "", "")] * 3], tmp_path / "x"
    )
    sheet = np.asarray(Image.open(tmp_path / "x").convert("RGB"))
    gap, side = evaluation.GAP, evaluation.PICTURE_SIDE
    step, middle = side + gap, gap + side // 2
    assert [tuple(sheet[middle, middle + i * step]) for i in range(4)] == [red, blue, red, red]
    assert tuple(sheet[gap + 2, gap + 2]) == tuple(sheet[gap + side - 3, gap + side - 3]) == red
    # Fitted into its square with its proportions.
    assert (sheet[2 * gap, middle + step] == 255).all()
    # The fifth is in a second row, with nothing beside it.
    assert (sheet[-step:, step + gap :] == 255).all()
    dark = (sheet < 128).all(axis=-1)[step + gap :]
    assert dark[:, gap : gap + side].sum() > 5 * dark[:, step : step + side].sum() > 0
    assert not dark[:, gap + side : step].any(), "no text runs over its picture's width"


SCIENCE = ["--task", "scienceqa"]
MISTAKES = [
    ("caption", "nowhere", [], "nowhere: no such directory"),
    ("caption", "llm/config.json", [], "config.json: not COCO captions"),
    ("caption", "sqa", [], "holds rows without captions, which .* need --task scienceqa"),
    ("scienceqa", "a/test", SCIENCE, "holds captions, which .* need --task caption"),
    ("scienceqa", "a/test", [], "trained for scienceqa, and --task caption .* pass --task scienceqa"),
    ("caption", "sqa", SCIENCE, "trained for caption, and --task scienceqa .* pass --task caption"),
    ("caption", "a/test", ["--task", "coco"], "--task is 'coco'; it should be 'caption' or 'scienceqa'"),
    ("scienceqa", "pictured", [*SCIENCE, "--image_captions", "true"], "problems of .* have no captions"),
    ("caption", "a/test", ["--references", "nowhere.json"], r"nowhere\.json: no such file"),
    ("caption", "b/test", ["--references", "{root}/two.json"], r"lack 1 of 3 evaluated pictures, val/2\.png"),
    ("caption", "a/test", ["--max_new_tokens=null", "--min_new_tokens=50"], "the longest answer, 40 tokens"),
    ("caption", "a/test", ["--max_new_tokens=9999"], "max_new_tokens 9999 after a prompt of 4 is more than"),
    # The longest of all prompts counts.
    ("scienceqa", "long", SCIENCE, r"max_new_tokens 4 after a prompt of \d{4} is more than the 1000"),
    ("caption", "a/test", ["--output", "{root}/llm/config.json"], "caption-test: (Not a dir|File exists)"),
]


@pytest.mark.parametrize(("model", "data", "more", "message"), MISTAKES)
def test_mistakes_are_named_before_decoding(root, asked, tmp_path, model, data, more, message) -> None:
    if data == "long":
        problems(root / "long", [PROBLEM, PROBLEM | {"question": "Which? " * 200}, PROBLEM])
    more = [word.format(root=root) for word in more]
    given = [*([] if "--output" in more else ["--output", str(tmp_path)]), *more]
    with pytest.raises(UserError, match=message) as error:
        evaluate(root / model, root / data, *given)
    assert "\n" not in str(error.value)
    assert asked.rows == []


def test_a_question_in_an_unseen_form_is_asked_with_a_warning(root, tmp_path, capsys) -> None:
    evaluate(root / "chat", root / "a/test", "--prompt", "Caption:", "--output", str(tmp_path / "eval"))
    assert "warning: the model was trained for chat, and --task caption" in capsys.readouterr().err


def test_published_files_of_one_name_have_shards_each(model, tmp_path) -> None:
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
    assert said(model, "caption-captions")[1]["references"][0] == "a of 1 ä%.png"
    (other,) = found.keys() - {"caption-captions"}
    assert said(model, other)[1]["references"][0] == "b of 1 ä%.png"
    # The same annotations over other pictures.
    evaluate(model, tmp_path / "a/captions.json", "--images", str(tmp_path / "c"))
    assert len({metrics["data"]["sha256"] for metrics in results(model).values()}) == 3
