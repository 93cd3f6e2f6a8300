"""The report: what the page says, that it loads nothing, and that no damage stops it."""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_shards import write_shards

from dehvf_ds.config import UserError
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.shards import ShardRow
from dehvf_ds.report.__main__ import main
from dehvf_ds.report.page import line_chart, smooth

EVIL = '<script>alert("x")</script> & a „Häuschen“ \u2028\'s ✓ $x_1$ {{ 1 }} http://example.org/x'
NAME = '2nd "b" & <i>ü $a$'
CAPTIONS = "Captions (x100, higher is better)"


class Page:
    """The page that the program writes, which is well-formed XML, too."""

    def __init__(self, *arguments: object) -> None:
        *runs, output = map(str, arguments)
        assert main([*runs, "--output", output]) == 0
        self.content = Path(output).read_bytes()
        self.root = ElementTree.fromstring(self.content)
        self.text = "".join(self.root.itertext())
        self.images = [Image.open(BytesIO(b64decode(i.attrib["src"][23:]))) for i in self.root.iter("img")]
        self.titles = {svg.attrib["aria-label"] for svg in self.root.iter("svg")}

    def table(self, heading: str, place: int = 0) -> list[list[str]]:
        """Cells by row of a table below the heading."""
        found, title = [], None
        for element in self.root.iter():
            title = element.text if element.tag in ("h2", "h3") else title
            if element.tag == "table" and title == heading:
                found.append(element)
        return [["".join(cell.itertext()).strip() for cell in row] for row in found[place].iter("tr")]

    def colors(self) -> list[object]:
        """Of the middle of each picture."""
        return [image.getpixel((image.width // 2, image.height // 2)) for image in self.images]


def png(color: str | tuple[int, int, int]) -> bytes:
    content = BytesIO()
    Image.new("RGB", (80, 40), color).save(content, "PNG")
    return content.getvalue()


def write_lines(path: Path, rows: list[dict], torn: str = "") -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join([*lines, torn]), encoding="utf-8")


def make_run(path: Path, base: float = 1.0, steps: int = 3, torn: str = "") -> Path:
    path.mkdir(parents=True)
    settings = {"run_dir": str(path), "train": {"lr": base / 1000, "betas": [0.9, 0.95]}, "seed": 0}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for step, noise in enumerate(np.random.default_rng(0).random(steps), 1):
        loss = None if 10 <= step <= 12 else base + 3 * math.exp(-step / 15)
        row = {"step": step, "samples": 16 * step, "train/loss": loss, "lr": noise, "samples_per_s": noise}
        row |= {"train/grad_norm": 5000 if step == 30 else base + noise, "skipped": 3 * (step > 12)}
        if step % 20 == 0:
            row |= {f"router/mean/{block:02d}": 0.1 * block + base / 100 for block in range(1, 4)}
            row |= {"router/entropy/00": 0.9, "eval/CIDEr": base * step, "val/loss": base + 1 / step}
        rows.append(row)
    write_lines(path / "metrics.jsonl", rows, torn)
    return path


def evaluate(run: Path, name: str, lines: dict[str, dict], **more: object) -> Path:
    directory = run / "eval" / name
    directory.mkdir(parents=True)
    metrics = {"protocol": {"split": name.split("-")[1]}, "decoding": {"num_beams": 1}, "num_samples": 2}
    (directory / "metrics.json").write_text(json.dumps(metrics | more))
    write_lines(directory / "predictions.jsonl", [{"key": key, **line} for key, line in lines.items()])
    (directory / "examples.png").write_bytes(png("green"))
    return directory


def said(caption: str) -> dict:
    return {"prediction": caption, "references": ["a house", EVIL], "scores": {"CIDEr": 12.34}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs that differ, and one that was never evaluated nor recorded a feature layer."""
    root = tmp_path_factory.mktemp("runs")
    first = make_run(root / "first", 1.0, 60, torn='{"step": 61, "train/lo')
    second, bare = make_run(root / NAME, 2.0, 60), make_run(root / "bare", 3.0, 5)
    scores = {"CIDEr": 101.256, "missing": {"SPICE": "no <Java>"}, "num_empty": 1}
    evaluate(first, "caption-test", {"1": said(EVIL), "2": said("")}, **scores)
    evaluate(second, "caption-val", {"1": said("a hut")}, CIDEr=90.0, METEOR=None, comparable=False)
    (first / "samples").mkdir()
    for step, content in ((20, png("red")), (100, png("blue")), (120, png("red")[:60])):
        (first / "samples" / f"step_{step:08d}.png").write_bytes(content)
    return [first, second, bare]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Page:
    return Page(*runs, tmp_path_factory.mktemp("page") / "new" / "report.html")


def test_tables_tell_what_runs_were_and_what_went_wrong(page):
    first, second, bare = page.table("Runs")[1:]
    assert first[:5] == ["first", "60", "960", f"{1 + 3 * math.exp(-4):.4f}", "1.0167 (step 60)"]
    for remark in ("metrics.jsonl: 1 unreadable line left out", "3 steps with a loss", "3 steps skipped"):
        assert remark in first[6]
    assert second[0] == NAME
    assert [*bare[1:5], bare[6]] == ["5", "80", f"{3 + 3 * math.exp(-1 / 3):.4f}", "—", "—"]
    differing, same = page.table("Settings that differ"), page.table("Settings that differ", 1)
    assert differing[1:] == [["train.lr", "0.001", "0.002", "0.003"]]
    assert same[1:] == [["seed", "0"], ["train.betas", "[0.9, 0.95]"]]


def test_scores_name_what_keeps_them_from_being_compared(page):
    assert page.table(CAPTIONS) == [
        ["run ‡", "split", "CIDEr", "rows"],
        ["first", "test", "101.26", "2"],
        [f"{NAME} †", "val", "90.00", "2"],
    ]
    assert page.table(CAPTIONS, 1)[1] == ["split", "test", "val"]
    for text in ("without SPICE: no <Java>", "empty captions, which are scored: 1"):
        assert f"first, test: {text}" in page.text
    assert "† not comparable with published numbers" in page.text


def test_charts_break_where_a_loss_is_not_finite_and_keep_every_spike(page):
    assert {"Training loss", "Validation loss", "Feature layers of first"} < page.titles
    assert not page.titles & {"Accuracy in training", "Feature layers of bare"}
    assert "global L2 norm, log scale" in page.text
    assert "Without validation: bare." in " ".join(page.text.split())
    steps = np.arange(5000.0)
    values = np.sin(steps) / 10
    values[501], values[1000], values[1002] = 9, math.nan, math.nan
    chart = str(line_chart("x", [(steps, values)], "step", "y", "fitted"))
    curve = max(re.findall(r' d="([^"]*)"', chart), key=len)
    heights = sorted(float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve))
    # Two gaps, and thinned out, but for the spike.
    assert (curve.count("M"), len(heights) < 4000) == (2, True)
    assert heights[1] - heights[0] > 100
    assert smooth(np.array([2.0, math.nan, 2.0]), 5).tolist()[::2] == [2.0, 2.0]


def test_examples_hold_what_users_wrote_as_text(page):
    first = page.table("Captions, test")[1:]
    assert [(row[0], row[-3], row[-2], row[-1]) for row in first] == [
        ("1", "first", EVIL, "CIDEr 12.3"),
        ("2", "first", "—", "CIDEr 12.3"),
    ]
    assert "".join(first[0][1].split("\n")) == f"a house{EVIL}"
    assert "What first said: step_00000100.png" in page.text


def test_the_page_loads_nothing_and_is_always_the_same(page, runs, tmp_path):
    for element in page.root.iter():
        assert element.tag != "script"
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            loads = name in ("src", "href") or "url(" in value or "//" in value
            assert not loads or value.startswith(("#", "url(#", "data:image/"))
    assert "default-src 'none'" in str([meta.attrib for meta in page.root.iter("meta")])
    ids = [element.attrib["id"] for element in page.root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert Page(*runs, tmp_path / "again.html").content == page.content


def test_pictures_are_those_of_the_rows_or_none(tmp_path):
    colors = {"0": (200, 0, 0), "1": (0, 0, 200), "2": (0, 150, 0)}
    rows = [ShardRow(key=key, members={"png": png(color), "txt": b"x"}) for key, color in colors.items()]
    settings = {"name": "x", "samples_per_shard": 2, "builder": {}}
    write_shards(rows, tmp_path / "shards", **settings)
    data = {"path": str(tmp_path / "shards"), "sha256": ShardIndex(tmp_path / "shards").digest}
    run = make_run(tmp_path / "run")
    evaluate(run, "caption-test", {key: said("x") for key in colors}, data=data)
    page = Page(run, tmp_path / "x.html")
    assert np.allclose(page.colors(), list(colors.values()), atol=6)
    assert "Without pictures" not in page.text
    # Other shards in that place: the contact sheet is the evaluation's own.
    write_shards(rows[::-1], tmp_path / "shards", **settings)
    page = Page(run, tmp_path / "x.html")
    assert np.allclose(page.colors(), [(0, 128, 0)], atol=6)
    assert "Without pictures beside the rows" in page.text


def test_answers_of_scienceqa_are_letters(tmp_path):
    lines: dict[str, dict] = {str(k): {"prediction": k, "choice": k, "answer": 1} for k in (0, 1)}
    lines["2"] = {"prediction": "Who knows", "choice": None, "answer": 1}
    run = make_run(tmp_path / "s")
    evaluate(run, "scienceqa-test", lines, accuracy={"NAT": 50.0, "Avg": 41.5541}, parse_failure_rate=2.5)
    page = Page(run, tmp_path / "x.html")
    scores = page.table("ScienceQA (x100, higher is better)")
    assert scores[0] == ["run", "split", "NAT", "Avg", "parse failures (%)", "rows"]
    assert scores[1][2:5] == ["50.00", "41.55", "2.50"]
    rows = [["0", "B", "s", "A", "wrong"], ["1", "B", "s", "B", "right"]]
    assert page.table("ScienceQA, test")[1:] == [*rows, ["2", "B", "s", "Who knows", "names no choice"]]


def test_runs_and_data_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / parent / "run") for parent in "ab"]
    for path in paths:
        evaluate(path, "caption-test", {"1": said("from a")}, CIDEr=1.0, data={"sha256": "a" * 64})
    page = Page(*paths, paths[0], tmp_path / "x.html")
    assert [row[0] for row in page.table("Runs")[1:]] == ["a/run", "b/run"]
    assert "All settings are the same" in page.text
    assert "‡" not in page.text
    evaluate(paths[0], "caption-test-12345678", {"1": said("from b")}, CIDEr=2.0, data={"sha256": "b" * 64})
    for name in ("shards/caption-test-0a", "caption-killed/.answers-1"):
        (paths[0] / "eval" / name).mkdir(parents=True)
    page = Page(paths[0], tmp_path / "x.html")
    assert [row[1:3] for row in page.table(CAPTIONS)[1:]] == [["test", "1.00"], ["test-12345678", "2.00"]]
    for heading, caption in (("Captions, test", "from a"), ("Captions, test-12345678", "from b")):
        assert [row[3] for row in page.table(heading)[1:]] == [caption]
    assert page.table("Runs")[1][6] == "eval/caption-killed: not finished"


def test_what_versions_before_0_2_wrote_is_shown_or_named(tmp_path):
    run = make_run(tmp_path / "old")
    evaluate(run, "coco-test", {"1": said("x")}, CIDEr=1.0)
    write_lines(run / "metrics.jsonl", [{"step": 1, "levels/mean/01": 0.5, "train/loss": 1.0}])
    page = Page(run, tmp_path / "x.html")
    assert page.table(CAPTIONS)[1] == ["old", "test", "1.00", "2"]
    assert "Not shown, since a version before 0.2 recorded them under other names: old." in page.text


def test_numbers_that_are_none_stop_no_page(tmp_path):
    run = make_run(tmp_path / "run")
    odd = ("NaN", "-Infinity", "1" + "0" * 400, '"x"', "[1]", "null", "true", "\x00")
    curves = ("train/loss", "val/loss", "eval/CIDEr", "lr", "samples", "skipped", "router/mean/01")
    metrics = ("num_samples", "num_empty", "CIDEr", "missing", "decoding", "data", "accuracy", "comparable")

    def values(names: tuple[str, ...], value: str) -> str:
        return "{" + ", ".join(f'"{name}": {value}' for name in names)

    with (run / "metrics.jsonl").open("a") as file:
        for step, value in enumerate(odd, 4):
            file.write(f'{values(curves, value)}, "step": {step}}}\n{values(("step", "lr"), value)}}}\n')
            directory = evaluate(run, f"caption-{step}", {"1": said("x")})
            (directory / "metrics.json").write_text(values(metrics, value) + "}")
    page = Page(run, tmp_path / "x.html")
    assert len(page.table("Runs")) == 2
    assert page.table("Runs")[1][3].startswith("3.")


@pytest.mark.parametrize("damage", ["none", "no_run", "config", "output"])
def test_a_mistake_is_an_error_that_names_the_path(tmp_path, damage):
    run, output = make_run(tmp_path / "run"), tmp_path / "x.html"
    if damage == "config":
        (run / "config.yaml").write_text("a: [\n b: }")
    named = {"none": run / "none", "no_run": tmp_path}.get(damage, run)
    with pytest.raises(UserError, match=re.escape(str(named))):
        main([str(named), "--output", str(run if damage == "output" else output)])
    assert not output.exists()
