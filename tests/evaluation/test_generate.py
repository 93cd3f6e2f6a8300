"""Captions and answers from the shell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluation.tiny_data import PROBLEM, lines, problems
from PIL import Image
from tiny_artifacts import build_bases, save, trained_model
from transformers import LlamaForCausalLM

from dehvf_ds.batch import Sample
from dehvf_ds.config import UserError, parse_generate_config
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.data.examples import read_sample
from dehvf_ds.data.prompts import QCM_A, encode_chat_prompt
from dehvf_ds.evaluation.dataset import open_questions
from dehvf_ds.evaluation.generate import ask_as_trained
from dehvf_ds.generate import main
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.model.adapter import find_trained


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model of each task over the same bases, and three pictures in a folder with one below it."""
    root = tmp_path_factory.mktemp("generate")
    bases = build_bases(root)
    for task in ("caption", "scienceqa", "chat"):
        model = trained_model(bases, task=task, prompt="Picture:" if task == "caption" else None)
        save(model, bases, root / task)
    (root / "pictures/below").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "below/c.webp")):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(root / "pictures" / name)
    (root / "pictures/notes.txt").write_text("no picture")
    return root


def names(root: Path) -> list[str]:
    return [str(root / "pictures" / name) for name in ("a.jpg", "b.png", "below/c.webp")]


def ask(root: Path, *more: str, task: str = "caption") -> int:
    return main(["--model", str(root / task), "--max_new_tokens", "6", *more])


def test_a_folder_in_batches_and_alone(root, capsys) -> None:
    assert ask(root, "--image", str(root / "pictures"), "--batch_size", "2") == 0
    together = capsys.readouterr()
    found = [line.split("\t") for line in together.out.splitlines()]
    assert [line[0] for line in found] == names(root)
    for name, text in found:
        assert ask(root, "--image", name) == 0
        assert capsys.readouterr().out == text + "\n"
    assert "3 answers, " in together.err
    assert ask(root, "--image", str(root / "pictures"), "--stream") == 0
    assert capsys.readouterr().out.split() == " ".join(text for _, text in found).split()


def test_lines_of_json(root, tmp_path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    given = ["--image", *names(root), "--prompt", "What?"]
    assert ask(root, *given, "--num_beams", "3", "--output", str(output)) == 0
    assert capsys.readouterr().out == ""
    found = lines(output)
    assert [row["image"] for row in found] == names(root)
    assert {row["prompt"] for row in found} == {"What?"}
    assert all(1 <= row["tokens"] <= 6 for row in found)
    with pytest.raises(UserError, match=r"out\.jsonl exists"):
        ask(root, *given, "--output", str(output))
    assert ask(root, *given, "--output", "-") == 0
    greedy = capsys.readouterr().out
    assert ask(root, *given, "--output", str(output), "--overwrite") == 0
    assert output.read_text() == greedy
    assert [row["text"] for row in lines(output)] != [row["text"] for row in found]
    # A question needs no picture.
    assert ask(root, "--prompt", "What is blue?", "--output", "-") == 0
    assert json.loads(capsys.readouterr().out)["image"] is None


def test_a_broken_picture_does_not_lose_the_others(root, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="1 of 3 pictures could not be read; the others are answered"):
        ask(root, "--image", names(root)[0], str(broken), names(root)[1], "--output", str(output))
    found = lines(output)
    assert sum("text" in row for row in found) == 2
    assert [row["image"] for row in found if "error" in row] == [str(broken)]
    assert f"warning: {broken}: not a readable picture" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"broken\.png: not a readable picture"):
        ask(root, "--image", str(broken))


ODD = ["1.png", "null.png", "[a].png", "a: b.png", "- x.png", "ä 犬.png", "a\tb\nc.png", "U\u2028.PNG"]


def test_pictures_of_odd_names_each_have_one_line(root, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*ODD, "x\udcff.png"]:
        shutil.copy(names(root)[1], tmp_path / name)
    (tmp_path / "._1.png").write_bytes(b"what macOS writes")
    assert ask(root, "--image", *ODD, "x\udcff.png", "--output", "out.jsonl") == 0
    assert [row["image"] for row in lines(Path("out.jsonl"))] == [*ODD, "x\udcff.png"]
    # Named, and named again by their folder and another spelling. (A program's own console takes any byte.)
    (tmp_path / "x\udcff.png").unlink()
    capsys.readouterr()
    assert ask(root, "--image", "1.png", ".", str(tmp_path / "null.png")) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(ODD)
    assert "note: 2 pictures are named more than once and answered once" in printed.err
    # An output never replaces a picture.
    with pytest.raises(UserError, match="is one of the pictures"):
        ask(root, "--image", "1.png", "--output", f"../{tmp_path.name}/1.png", "--overwrite")
    assert Path("1.png").read_bytes() == Path(names(root)[1]).read_bytes()


def prompt_ids(root: Path, task: str, *more: str) -> list[int]:
    config = parse_generate_config(["--model", str(root / task), *more])
    record, collator = ask_as_trained(config, find_trained(root / task))
    return collator([Sample(key="", image=None, record=record)]).input_ids[0].tolist()


def test_science_and_chats_are_asked_as_they_are_evaluated_and_trained(root, tmp_path) -> None:
    found = prompt_ids(root, "scienceqa", "--prompt", "Which?", "--choices", "red", "blue", "--hint", "Sky.")
    problems(tmp_path / "data", [PROBLEM | {"hint": "Sky."}])
    trained = find_trained(root / "scienceqa")
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, None)
    form = {"prompt": None, "scienceqa": QCM_A}
    questions = open_questions(str(tmp_path / "data"), "scienceqa", tokenizer, transform, **form)
    assert found == questions.collator([read_sample(questions.index, 0)]).input_ids[0].tolist()
    wanted = encode_chat_prompt(tokenizer, [{"role": "user", "content": "What is it?"}])
    assert prompt_ids(root, "chat", "--prompt", "What is it?") == wanted


def test_the_tower_looks_once_and_nothing_of_it_is_cached(root, monkeypatch) -> None:
    looks, lengths = [], []
    encode = DehvfForConditionalGeneration.encode_images
    decoder = LlamaForCausalLM.forward

    def counted(self, pixel_values, has_image):
        looks.append(len(pixel_values))
        return encode(self, pixel_values, has_image)

    def measured(self, *args, **kwargs):
        output = decoder(self, *args, **kwargs)
        lengths.append(output.past_key_values.get_seq_length())
        return output

    monkeypatch.setattr(DehvfForConditionalGeneration, "encode_images", counted)
    monkeypatch.setattr(LlamaForCausalLM, "forward", measured)
    assert ask(root, "--image", *names(root), "--num_beams", "3", "--prompt", "Say:") == 0
    assert looks == [3]
    num_prompt = len("Say:")  # a token a byte
    assert lengths == list(range(num_prompt, num_prompt + len(lengths)))
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("caption", [], "pass pictures with --image, or a question with --prompt"),
        ("caption", ["--prompt", "a", "--choices", "x", "y"], "--choices and --hint are for ScienceQA"),
        ("caption", ["--prompt", "a", "--output", "/nowhere/x.jsonl"], "no such folder /nowhere"),
        ("scienceqa", ["--prompt", "a", "--choices", "a", "\udcff"], "--choices: not UTF-8"),
        ("scienceqa", ["--prompt", "a"], "--choices: this model was trained on ScienceQA"),
        ("scienceqa", ["--prompt", "a", "--choices", *"abcdefghijklmnopqrstuvwxyz+"], "name 2 to 26 texts"),
        ("caption", ["--image", "{empty}"], "no pictures in this folder"),
        ("chat", ["--image", "{picture}"], "a model of task chat needs a question"),
        (
            "caption",
            ["--prompt", "a", "--max_new_tokens", "128"],
            r"128 after a prompt of \d .* the 128 tokens",
        ),
    ],
)
def test_mistakes_are_named_before_weights_load(root, tmp_path, monkeypatch, task, more, message) -> None:
    monkeypatch.setattr("dehvf_ds.model.adapter.TrainedModel.load", None)
    with pytest.raises(UserError, match=message):
        ask(root, *[word.format(picture=names(root)[0], empty=tmp_path) for word in more], task=task)
