"""Caption scores are those of the package's own driver, whatever captions hold and whatever fails."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.spice import spice

from dehvf_ds.config import UserError
from dehvf_ds.evaluation import coco
from dehvf_ds.evaluation.coco import PUNCTUATION, SPICE_PARSER, CaptionScorer, ptb_tokens, simple_tokens

REFERENCES = {
    "a": ["A dog runs on the grass.", "A brown dog running."],
    "b": ["Two people ride bikes down a street.", "People riding bicycles."],
    "c": ["A cat sleeps on a red sofa.", "The cat is asleep on the couch."],
    "d": ["Ein Hund läuft über die Wiese, 犬!", "A dog at a “café”."],
}
PREDICTIONS = {
    "a": "A dog runs.",
    "b": "",
    "c": "A dog sleeps on a sofa, naïvely.",
    "d": "犬 läuft (café) 😀",
}
BLEU = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]
WITHOUT_JAVA = [*BLEU, "ROUGE-L", "CIDEr"]


def java(test):
    return pytest.mark.java(pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")(test))


class Scores:
    """What a scorer returns."""

    def __init__(self, references=REFERENCES, predictions=PREDICTIONS, tokenizer="simple") -> None:
        records = [(key, {"captions": captions}) for key, captions in references.items()]
        scored = CaptionScorer(records, tokenizer=tokenizer).score([predictions[key] for key in references])
        self.metrics, self.corpus, self.missing = scored.metrics, scored.numbers, scored.metrics["missing"]
        self.each = dict(zip(references, scored.scores, strict=True))


@pytest.fixture
def no_java(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch):
    """Puts a script in Java's place."""

    def put(script: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return put


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("while :; do read line || sleep 0.1; done", "Java was not done after 0.01 minutes"),
        # As the real one where memory is short.
        ("echo 'Picked up JAVA_TOOL_OPTIONS' >&2; echo 'no room for 2G' >&2; exit 1", "no room for 2G"),
    ],
    ids=["never ends", "fails"],
)
def test_java_that_fails_or_hangs_is_quoted_and_stops_no_other_metric(
    fake_java, monkeypatch, script: str, reason: str
) -> None:
    fake_java(script)
    monkeypatch.setattr(coco, "JAVA_MINUTES", 0.01)
    monkeypatch.setattr(coco, "JAVA_MINUTES_OF_A_TEXT", 0)
    with pytest.raises(UserError, match=f"PTB tokenization.*: {reason}"):
        Scores(tokenizer="ptb")
    scores = Scores()
    assert scores.missing["METEOR"] == reason
    assert list(scores.corpus) == WITHOUT_JAVA


@java
@pytest.mark.slow
# The driver leaves its own processes to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_scores_equal_the_packages_own_driver(monkeypatch) -> None:
    import pycocoevalcap.eval as package

    class Annotations:
        def __init__(self, captions: dict[str, list[str]]) -> None:
            self.imgToAnns = {k: [{"caption": c} for c in v] for k, v in captions.items()}

        def getImgIds(self) -> list[str]:
            return sorted(self.imgToAnns)

    # Its parser is not installed.
    monkeypatch.setattr(package, "Spice", package.Rouge)
    guesses = Annotations({k: [v] for k, v in PREDICTIONS.items()})
    driver = package.COCOEvalCap(Annotations(REFERENCES), guesses)
    driver.evaluate()

    # A machine that writes 0,31 and has no Unicode; Java reads the second after the command line.
    german = "-Duser.language=de -Dfile.encoding=ISO-8859-1"
    environment = {"LC_ALL": "de_DE.ISO-8859-1", "JAVA_TOOL_OPTIONS": german, "_JAVA_OPTIONS": german}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    scores = Scores(tokenizer="ptb")
    assert list(scores.corpus) == [*BLEU, "METEOR", "ROUGE-L", "CIDEr"]
    assert (scores.metrics["comparable"], scores.metrics["num_empty"]) == (True, 1)
    for name, value in scores.corpus.items():
        official = name.replace("BLEU-", "Bleu_").replace("-", "_")
        assert value == pytest.approx(100 * driver.eval[official], abs=1e-6)
        for key in REFERENCES:
            expected = 100 * driver.imgToEval[key][official]
            assert scores.each[key][name] == pytest.approx(expected, abs=1e-6)
    assert all(os.environ.get(name) == value for name, value in environment.items())


@java
def test_no_character_shifts_the_captions() -> None:
    captions = {
        "a": ["one\r\ntwo", "x\u2028y\vz\f", "half \ud83d pair"],
        "b": ["", "\n"],
        "c": ["U.S.", " "],
    }
    tokens = ptb_tokens(captions)
    assert tokens["a"][:2] == ["one two", "x y z"]
    assert [len(group) for group in tokens.values()] == [3, 2, 2]
    assert [tokens["b"], tokens["c"]] == [["", ""], ["u.s.", ""]]


def test_without_java_the_simple_tokenizer_scores_and_is_not_comparable(no_java) -> None:
    with pytest.raises(UserError, match="default-jre-headless"):
        Scores(tokenizer="ptb")
    scores = Scores()
    assert list(scores.corpus) == WITHOUT_JAVA
    assert list(scores.missing) == ["METEOR", "SPICE"]
    assert "default-jre-headless" in scores.missing["METEOR"]
    assert not scores.metrics["comparable"]
    assert all(list(row) == WITHOUT_JAVA for row in scores.each.values())
    texts = ["The dog's “T-shirt”, (red)!", "Über  Ñ\t犬", PUNCTUATION, ""]
    assert simple_tokens({"a": texts}) == {"a": ["the dog's “t-shirt” red", "über ñ 犬", "", ""]}


def test_what_has_no_word_is_counted_and_scores_nothing(no_java) -> None:
    empty = {"a": "", "b": " \n", "c": "...", "d": "A dog at a café."}
    scores = Scores(REFERENCES | {"a": ["...", "a dog"]}, empty)
    assert scores.metrics["num_empty"] == 3
    # An empty answer would equal it.
    assert scores.metrics["num_wordless_references"] == 1
    for key in "abc":
        assert max(scores.each[key].values()) == pytest.approx(0, abs=1e-6)
    assert scores.corpus["ROUGE-L"] == pytest.approx(scores.each["d"]["ROUGE-L"] / 4)
    with pytest.raises(UserError, match="1 pictures have no reference caption with a word, b the first"):
        Scores({"a": ["A dog."], "b": ["...", " \n"]}, {"a": "", "b": ""})


def fail(*_: object) -> None:
    raise ZeroDivisionError("two\nlines")


@pytest.mark.parametrize("broken", [fail, lambda *_: (float("nan"), [0.0] * 4)])
def test_a_metric_that_fails_or_gives_no_numbers_is_named_and_the_others_stay(
    no_java, monkeypatch, broken
) -> None:
    whole = Scores()
    monkeypatch.setattr(Cider, "compute_score", broken)
    scores = Scores()
    assert re.match("ZeroDivisionError: two lines$|ValueError: ", scores.missing["CIDEr"])
    assert scores.corpus == {name: value for name, value in whole.corpus.items() if name != "CIDEr"}
    assert all("CIDEr" not in row for row in scores.each.values())
    monkeypatch.setattr(coco, "METRICS", {("CIDEr",): fail})
    with pytest.raises(UserError, match="no caption metric could be computed; ZeroDivisionError: two lines"):
        Scores()


def test_nothing_in_a_caption_ends_a_line_or_a_field_of_meteors(tmp_path, fake_java) -> None:
    told = tmp_path / "told"
    fake_java(f"""while IFS= read -r line; do
      printf '%s\\n' "$line" >> {told}
      case "$line" in SCORE*) echo 1.0 2.0;; EVAL*) echo 0.25; echo 0.75; echo 0.5;; esac
    done""")
    references = {"a": ["x ||| y", "p\tq\r\nr\u2028s"], "b": ["||||| z\x85", "..."]}
    scores = Scores(references, {"a": "||| u\nv", "b": ""})
    assert scores.corpus["METEOR"] == 50
    assert [row["METEOR"] for row in scores.each.values()] == [25, 75]
    assert told.read_text(encoding="utf-8").split("\n") == [
        "SCORE ||| x y ||| p q r s ||| u v",
        "SCORE ||| z ||| ",
        "EVAL ||| 1.0 2.0 ||| 1.0 2.0",
        "",
    ]


@pytest.mark.parametrize(
    ("references", "predictions", "undefined"),
    [
        ({"a": ["a dog runs fast"]}, {"a": "a dog runs fast"}, ["CIDEr"]),
        ({"a": ["a dog", "it"], "b": ["it", "a dog"]}, {"a": "a dog", "b": ""}, [*BLEU[2:], "CIDEr"]),
        ({"a": ["a dog"], "b": ["a cat"]}, {"a": "", "b": "dog"}, BLEU[1:]),
        ({"a": ["a dog"], "b": ["a cat"]}, {"a": "it is a cat", "b": "dog"}, []),
    ],
    ids=["one picture", "the same references", "one word", "defined"],
)
def test_what_the_captions_do_not_define_is_no_number(no_java, references, predictions, undefined) -> None:
    scores = Scores(references, predictions)
    assert sorted(scores.missing) == sorted([*undefined, "METEOR", "SPICE"])
    assert set(scores.corpus) == set(WITHOUT_JAVA) - set(undefined)
    for name in undefined:
        assert re.search("^(with one picture|where all pictures|no answer has )", scores.missing[name])


def test_spice_is_scored_where_its_parser_is(tmp_path, monkeypatch, fake_java) -> None:
    class FakeSpice:
        def compute_score(self, truth, guess):
            assert list(truth) == list(guess) == ["a", "b", "c", "d"]
            return 0.25, [{"All": {"f": value}, "Color": {"f": 9.0}} for value in (0.0, 0.1, 0.4, 0.5)]

    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(spice, "Spice", FakeSpice)
    fake_java("exit 1")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / SPICE_PARSER[0]).touch()
    assert Scores().missing["SPICE"].startswith("its parser is not installed")
    (tmp_path / "lib" / SPICE_PARSER[1]).touch()
    scores = Scores()
    assert list(scores.missing) == ["METEOR"]
    assert scores.corpus["SPICE"] == 25
    assert [row["SPICE"] for row in scores.each.values()] == [0, 10, 40, 50]
