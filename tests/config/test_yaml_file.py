"""YAML as people write it: what is refused, and that no text or number changes on its way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dehvf_ds.config import (
    RunConfig,
    UserError,
    load_run_config,
    parse_eval_config,
    parse_run_config,
    save_run_config,
)

BASE = """\
run_dir: runs/x
model:
  language_model: llm
  vision_tower: tower
data:
  train: shards
"""
TEXTS = [
    "# x", "#1 caption", "yes", "no", "on", "null", "~", "Null", "1e-3", "a: b", "[x]", "{x: 1}", "1_000",
    "08", "2020-01-01", "12:30", "-x", "true", "'q'", '"q"', "None", "- a", "x # y", "a\nb", "@x", "%x", "&a",
    "*b", "!t x", "|", ">", ".inf", "0x10", " x ", "", "ü", "--x", "a=b", "\\n", "{}", "?", "<<", "=",
]  # fmt: skip


def parse(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_run_config(["--config", str(path)])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_given(text: str, tmp_path: Path) -> None:
    config = parse_run_config(["--config=demo", f"--data.prompt={text}"])
    assert config.data.prompt == text
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    lr=st.floats(1e-300, 100),
    name=st.text("abc $~{}#:.'", min_size=1, max_size=12).map(lambda text: f"d/{text}e"),
)
def test_what_is_saved_reads_back_equal(tmp_path_factory, prompt: str | None, lr: float, name: str) -> None:
    base = parse_run_config(["--config=demo"])
    from dataclasses import replace

    config = replace(
        base,
        run_dir=name,
        data=replace(base.data, prompt=prompt, train=name),
        train=replace(base.train, lr=lr),
    )
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_run_config(config, path)
    assert load_run_config(path) == config


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 1.e-3", "lr", 1e-3),
        ("lr: '2E-4'", "lr", 2e-4),
        ("lr: .5", "lr", 0.5),
        ("lr: 1", "lr", 1.0),
        ("warmup_steps: 010", "warmup_steps", 10),
        ("warmup_steps: 1_000", "warmup_steps", 1000),
        ("betas: [0.8, 9e-1]", "betas", (0.8, 0.9)),
        ("activation_checkpointing: yes", "activation_checkpointing", True),
        ("activation_checkpointing: off", "activation_checkpointing", False),
        ("steps: null", "steps", None),
        ("steps: ~ # all", "steps", None),
        ("steps:", "steps", None),
    ],
)
def test_a_number_is_what_it_looks_like(tmp_path: Path, written: str, name: str, value: object) -> None:
    found = getattr(parse(tmp_path, f"{BASE}train:\n  {written}\n").train, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("1e-3", "1e-3"),
        ("2020-01-01", "2020-01-01"),
        ("'null'", "null"),
        ("null", None),
        ("'#1'", "#1"),
        ("a # b", "a"),
        ("|\n    two\n    lines", "two\nlines\n"),
        ("''", ""),
        ("!!str 1", "1"),
    ],
)
def test_a_text_in_a_file_is_what_it_looks_like(tmp_path: Path, written: str, value: str | None) -> None:
    assert parse(tmp_path, f"{BASE}  prompt: {written}\n").data.prompt == value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("data:\n  train: other\n", "data stands there twice, in line 5 and in line 7; keep one"),
        ("train: {lr: 1, lr: 1}\n", "train.lr stands there twice, in line 7 and in line 7"),
        ("train:\n  lr: 1\n  steps: 2\n  lr: 2\n", "train.lr stands there twice, in line 8 and in line 10"),
        ('"run_dir": y\n', "run_dir stands there twice, in line 1 and in line 7"),
        ("nonsense: {a: 1, a: 2}\n", "no setting nonsense"),
        ("  augment: {flip: 0, flip: 1}\n", "data.augment.flip stands there twice"),
        ("  prompt: #1 caption\n", "line 7: data.prompt has no value: # begins a comment"),
        ("  val: # none yet\n", "data.val has no value: # begins a comment"),
        ("  prompt: [a]\n", "data.prompt is a list"),
        ("  prompt: {}\n", "data.prompt is a section"),
        ("  prompt: !x y\n", "the tag !x is not known"),
        ("  task:\n", "data.task needs a value"),
        ("  task: Caption\n", "data.task is 'Caption'; it must be one of caption, scienceqa, chat"),
        ("  max_tokens: '12a'\n", "data.max_tokens is '12a', not a whole number"),
        ("  max_tokens: 1:20\n", "data.max_tokens is '1:20', not a whole number"),
        ("train: 3\n", "train is not a section"),
        ("train: [a]\n", "train is not a section"),
        ("train: {learning_rate: 1}\n", "line 7: no setting train.learning_rate"),
        ("train: {micro-batch-size: 1}\n", "did you mean train.micro_batch_size?"),
        ("lr: 1\n", "did you mean train.lr?"),
        ("? [a]\n: b\n", "a key is not a word"),
        ("train: {steps: 1\n", "no YAML"),
        ("\tx: 1\n", "line 7: no YAML"),
        ("---\nrun_dir: y\n", "no YAML"),
        ("train: *nowhere\n", "no YAML"),
    ],
)
def test_a_file_is_refused_in_one_line_with_its_place(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(tmp_path, BASE + more)
    assert message in str(error.value)
    assert str(tmp_path / "c.yaml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 5000, b"- a\n", b"text\n"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        parse_run_config(["--config", str(tmp_path / "c.yaml")])


def test_empty_sections_merges_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode() + b"train:\n  # steps: 4\neval:\n")
    assert parse_run_config(["--config", str(tmp_path / "c.yaml")]).train.steps is None
    merged = BASE + "train: &t {lr: 1, steps: 2}\neval: {}\n"
    text = merged.replace("model:\n", "model:\n  lora: &l {rank: 2}\n").replace("eval: {}\n", "")
    assert parse(tmp_path, text).model.lora.rank == 2
    nested = BASE.replace(
        "  vision_tower: tower\n",
        "  vision_tower: tower\n  lora:\n    <<: {rank: 2, alpha: 3}\n    rank: 1\n",
    )
    assert parse(tmp_path, nested).model.lora.rank == 1
    assert parse(tmp_path, nested).model.lora.alpha == 3


def test_of_several_files_and_flags_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("train: {steps: 7}\n")
    (tmp_path / "c.yaml").write_text(BASE + "train: {steps: 3, lr: 1}\n")
    files = ["--config", str(tmp_path / "c.yaml"), "--config", str(tmp_path / "more.yaml")]
    config = parse_run_config([*files, "--train.lr", "2", "--train.lr", "3"])
    assert (config.train.steps, config.train.lr) == (7, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lr"], "--train.lr needs a value"),
        (["--data.prompt", "--seed", "1"], "written --data.prompt=--..."),
        (["caption"], "'caption': a value without a flag before it"),
        (["--train", "{}"], "--train: no such flag"),
        (["--lr", "1"], "--lr: no such flag; did you mean train.lr?"),
        (["--dry-run", "1"], "--dry_run is '1'; it must be true or false"),
    ],
)
def test_flags_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run_config(arguments)
    assert message in str(error.value)


def test_help_tells_every_setting(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_eval_config(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "--num_beams INT" in told
    assert "hypotheses of beam search; 1 is greedy. (default: 1)" in " ".join(told.split())
    assert os.linesep in told


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("train: {lr: 0.1}\ntrain.lr: 0.5", "line 8: train.lr stands there a second time; keep one"),
        ("train.lr: 0.5\ntrain: {lr: 0.1}", "line 8: train.lr stands there a second time; keep one"),
        ("train: &t\n  <<: *t", "line 8: << takes another section, not one that it stands in"),
        ("train: &t\n  <<: [*t]", "<< takes another section, not one that it stands in"),
    ],
)
def test_what_yaml_would_lose_or_not_end_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        parse(tmp_path, f"{BASE}{lines}\n")
    assert message in str(found.value)


@pytest.mark.parametrize("rest", ["  # the test set", " #2", " #", ""])
def test_a_comment_after_a_text_is_one(tmp_path: Path, rest: str) -> None:
    assert parse(tmp_path, f"{BASE}eval: {{}}\nresume: never{rest}\n").resume == "never"
    assert parse(tmp_path, f"{BASE}resume: 'never #2'{rest}\n").resume == "never #2"


def test_sections_merge_and_their_own_lines_win(tmp_path: Path) -> None:
    lines = "train:\n  <<: [{lr: 0.5}, {lr: 0.6, steps: 4}]\n  epochs: 2\n"
    train = parse(tmp_path, BASE + lines).train
    assert (train.lr, train.steps, train.epochs) == (0.5, 4, 2)
