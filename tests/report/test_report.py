"""tools/report.py: what the page says, that it is safe and self-contained, and how a browser draws it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.report.cli import main
from dehvf_ds.report.series import has_spikes, smooth, thin, ticks

ROOT = Path(__file__).parents[2]
EVIL = '<script>alert("x")</script> & a „Häuschen“ \u2028\'s ✓ http://example.org/x'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements with their attributes, and the rows of each table, by the heading above it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.open: list[str] = []
        self.heading = self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h2", "h3"):
            self.heading = ""
        elif tag == "table":
            self.tables.append((self.heading, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("h2", "h3"):
            self.heading += data
        elif "td" in self.open or "th" in self.open:
            self.tables[-1][1][-1][-1] += data

    def table(self, heading: str, place: int = 0) -> list[list[str]]:
        return [rows for title, rows in self.tables if title == heading][place]

    def titles(self) -> list[str]:
        return [str(a["aria-label"]).split(":")[0] for t, a in self.tags if t == "svg" and "aria-label" in a]


def png(color: str) -> bytes:
    content = BytesIO()
    Image.new("RGB", (80, 40), color).save(content, "PNG")
    return content.getvalue()


def write_lines(path: Path, rows: list[dict], torn: str = "") -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines) + torn, encoding="utf-8")


def make_run(path: Path, lr: float, base: float, steps: int = 60, torn: str = "") -> Path:
    path.mkdir()
    settings = {"run_dir": str(path), "train": {"lr": lr, "betas": [0.9, 0.95]}, "data": {"task": "caption"}}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = []
    for step in range(1, steps + 1):
        loss = None if 10 <= step <= 12 else base + 3 * math.exp(-step / 15)
        row = {"step": step, "samples": 16 * step, "train/loss": loss, "lr": lr, "samples_per_s": base}
        row |= {"train/grad_norm": 5000.0 if step == 30 else base, "skipped": 3 if step > 12 else 0}
        if step % 20 == 0:
            row |= {f"levels/mean/{block:02d}": 0.1 * block + base / 100 for block in range(1, 4)}
            row |= {f"levels/entropy/{layer:02d}": 0.9 for layer in range(4)}
            row |= {"eval/CIDEr": base * step, "eval/BLEU-4": 1.0, "val/loss": base + 1 / step}
        rows.append(row)
    write_lines(path / "metrics.jsonl", rows, torn)
    return path


def evaluate(run: Path, split: str, captions: dict[str, str], task: str = "coco", **more) -> None:
    directory = run / "eval" / f"{task}-{split}"
    directory.mkdir(parents=True)
    metrics = {"protocol": {"task": task, "split": split}, "decoding": {"num_beams": 1}, "num_samples": 2}
    (directory / "metrics.json").write_text(json.dumps(metrics | more))
    lines = [
        {"key": key, "prediction": caption, "references": ["a house", EVIL], "scores": {"CIDEr": 12.34}}
        for key, caption in captions.items()
    ]
    write_lines(directory / "predictions.jsonl", lines)
    (directory / "examples.png").write_bytes(png("green"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs that differ, and one that was never evaluated nor recorded a level."""
    root = tmp_path_factory.mktemp("runs")
    first = make_run(root / "first", 0.002, 1.0, torn='{"step": 61, "train/lo')
    second = make_run(root / '2nd "b" & <i>ü', 0.001, 2.0)
    bare = make_run(root / "bare", 0.001, 3.0, steps=5)
    evaluate(first, "test", {"1": EVIL, "2": ""}, CIDEr=101.256, missing={"SPICE": "no <Java>"}, num_empty=1)
    evaluate(second, "val", {"1": "a hut"}, CIDEr=90.0, comparable=False)
    (first / "samples").mkdir()
    for step, content in ((20, png("red")), (100, png("blue")), (120, png("blue")[:-9])):
        (first / "samples" / f"step_{step:08d}.png").write_bytes(content)
    return [first, second, bare]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("page") / "new" / "report.html"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def test_overview_tells_steps_losses_and_what_went_wrong(page):
    first, second, bare = page.table("Runs")[1:]
    assert first[:5] == ["first", "60", "960", f"{1 + 3 * math.exp(-4):.4f}", "1.0167 (step 60)"]
    for remark in ("metrics.jsonl: 1 unreadable line left out", "3 steps with a loss", "3 steps skipped"):
        assert remark in first[6]
    assert second[0] == '2nd "b" & <i>ü'
    assert bare[1:5] == ["5", "80", f"{3 + 3 * math.exp(-1 / 3):.4f}", "—"]
    assert bare[6] == "—"


def test_settings_that_differ_stand_apart_from_the_same(page):
    differ, same = page.table("Settings that differ"), page.table("Settings that differ", 1)
    assert differ[1:] == [["train.lr", "0.002", "0.001", "0.001"]]
    assert same[1:] == [["data.task", "caption"], ["train.betas", "[0.9, 0.95]"]]


def test_scores_name_what_keeps_them_from_being_compared(page):
    heading = "Captions (x100, higher is better)"
    assert page.table(heading)[1:] == [
        ["first", "test", "101.26", "2"],
        ['2nd "b" & <i>ü †', "val", "90.00", "2"],
    ]
    assert page.table(heading, 1)[1:] == [["split", "test", "val"]]
    assert "first, test: without SPICE: no <Java>" in page.text
    assert "first, test: empty captions, which are scored: 1" in page.text
    assert "† not comparable with published numbers" in page.text


def test_evaluations_on_equal_terms_are_not_doubted(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for path in paths:
        path.parent.mkdir()
        make_run(path, 0.1, 1.0, 3)
        evaluate(path, "test", {"1": "x"}, CIDEr=1.0)
    assert main([*map(str, paths), "--output", str(tmp_path / "x.html")]) == 0
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert [row[0] for row in Page(text).table("Runs")[1:]] == ["a/run", "b/run"]
    assert "All settings are the same" in text
    assert "‡" not in text


def test_charts_include_the_scores_inside_the_run(page):
    titles = page.titles()
    assert {"Training loss", "Validation loss", "CIDEr inside the run"} <= set(titles)
    assert "Accuracy inside the run" not in titles
    assert "global L2 norm, log scale" in page.text
    # The three losses that are not finite break the line, pale and full, of both runs; bare's is whole.
    loss = next(
        i for i, (t, a) in enumerate(page.tags) if t == "svg" and "Training loss" in str(a.get("aria-label"))
    )
    end = next(i for i, (t, _) in enumerate(page.tags) if i > loss and t == "figure")
    assert sum(t == "polyline" for t, _ in page.tags[loss:end]) == 2 * (2 + 2 + 1)


def test_examples_hold_what_users_wrote_as_text(page):
    rows = page.table("Captions, test")[1:]
    assert [(row[0], row[2], row[3]) for row in rows] == [("1", "first", EVIL), ("2", "first", "—")]
    assert rows[0][1] == "a house" + EVIL
    assert rows[0][4] == "CIDEr 12.3"


def test_pictures_are_the_sheets_and_the_last_whole_one_of_the_run(page):
    pictures = [a for t, a in page.tags if t == "img"]
    assert [a["alt"] for a in pictures][-1] == "What first said at step 100"
    assert len(pictures) == 3


def test_page_asks_nobody_for_anything(page):
    assert "script" not in {t for t, _ in page.tags}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name.endswith("href")}
        assert all(
            (v or "").startswith("data:image/png;base64,") for k, v in attributes.items() if k == "src"
        )
        assert not any("//" in (v or "") for k, v in attributes.items() if k != "src")
    assert "default-src 'none'" in str([a for t, a in page.tags if t == "meta"])


def test_answers_of_scienceqa_are_letters(tmp_path):
    run = make_run(tmp_path / "s", 0.1, 1.0, 3)
    evaluate(run, "test", {}, "scienceqa", accuracy={"NAT": 50.0, "Avg": 41.5541}, parse_failure_rate=2.5)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "eval/accuracy": 30.0}\n{"step": 2, "eval/accuracy": 40}\n'
    )
    lines: list[dict] = [{"key": k, "prediction": k, "choice": k, "answer": 1} for k in (0, 1)]
    lines.append({"key": 2, "prediction": "Who knows", "choice": None, "answer": 1})
    write_lines(run / "eval/scienceqa-test/predictions.jsonl", lines)
    assert main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert page.titles() == ["Accuracy inside the run"]
    assert page.table("ScienceQA (x100, higher is better)")[1][10:12] == ["41.55", "2.50 %"]
    rows = [["0", "B", "s", "A", "wrong"], ["1", "B", "s", "B", "right"]]
    assert page.table("ScienceQA, test")[1:] == [*rows, ["2", "B", "s", "Who knows", "names no choice"]]


ODD = {
    "nan": "NaN",
    "inf": "-Infinity",
    "huge": "1" + "0" * 400,
    "large": "1e308",
    "text": '"x"',
    "list": "[1]",
    "null": "null",
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_numbers_that_are_none_stop_no_page(tmp_path, value):
    run = make_run(tmp_path / "run", 0.1, 1.0, 3)
    names = [
        "train/loss",
        "val/loss",
        "eval/CIDEr",
        "lr",
        "samples",
        "skipped",
        "levels/mean/01",
        "visual/gain/0",
    ]
    row = ", ".join(f'"{name}": {value}' for name in names)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 4, {row}}}\n{{"step": {value}, "train/loss": 1.0}}\n\x00\x00\n')
    evaluate(run, "test", {"1": "x"}, CIDEr=1.0)
    names = ("num_samples", "num_empty", "CIDEr", "missing", "decoding", "data")
    odd = "".join(f', "{name}": {value}' for name in names)
    text = f'{{"protocol": {{"task": "coco", "split": "test"}}{odd}}}'
    (run / "eval/coco-test/metrics.json").write_text(text)
    assert main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert page.table("Captions (x100, higher is better)")[1][:2] == ["run", "test"]
    assert page.table("Runs")[1][3].startswith("3.")


def test_data_of_one_name_are_told_apart(tmp_path):
    run = make_run(tmp_path / "run", 0.1, 1.0, 3)
    evaluate(run, "test", {"1": "from a"}, CIDEr=1.0, data={"sha256": "a" * 64})
    evaluate(run, "test-12345678", {"1": "from b"}, CIDEr=2.0, data={"sha256": "b" * 64}, num_unreadable=3)
    for name in ("shards/coco-test-0a", "coco-killed/.answers-1"):
        (run / "eval" / name).mkdir(parents=True)
    metrics = run / "eval/coco-test-12345678/metrics.json"
    metrics.write_text(metrics.read_text().replace('"split": "test-12345678"', '"split": "test"'))
    assert main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    rows = page.table("Captions (x100, higher is better)")[1:]
    assert [row[1:3] for row in rows] == [["test", "1.00"], ["test-12345678", "2.00"]]
    for heading, said in (("Captions, test", "from a"), ("Captions, test-12345678", "from b")):
        assert [row[3] for row in page.table(heading)[1:]] == [said]
    assert "run, test-12345678: pictures that could not be read, which count as empty answers: 3" in page.text
    assert "eval/coco-killed: not finished" in page.text
    assert "eval/shards" not in page.text


def test_a_metric_that_no_run_has_is_no_column(tmp_path):
    run = make_run(tmp_path / "run", 0.1, 1.0, 3)
    evaluate(run, "test", {"1": "x"}, CIDEr=None, METEOR=3.0, missing={"CIDEr": "with one picture"})
    assert main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert page.table("Captions (x100, higher is better)")[0] == ["run", "split", "METEOR", "rows"]
    assert "run, test: without CIDEr: with one picture" in page.text


@pytest.mark.parametrize("damage", ["none", "no_run", "config", "output"])
def test_a_mistake_is_one_line_that_names_the_path(tmp_path, damage):
    run, output = make_run(tmp_path / "run", 0.1, 1.0, 3), tmp_path / "x.html"
    wrong = {"none": run / "none", "no_run": tmp_path, "config": run / "config.yaml", "output": run}[damage]
    if damage == "config":
        wrong.write_text("a: [\n b: }")
    arguments = {"none": wrong, "no_run": wrong}.get(damage, run)
    entry = [sys.executable, str(ROOT / "tools" / "report.py")] if damage == "config" else None
    arguments = [str(arguments), "--output", str(run if damage == "output" else output)]
    if entry:
        done = subprocess.run([*entry, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"error: {wrong}: ")
    else:
        with pytest.raises(UserError, match=re.escape(str(wrong))) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    assert not output.exists()


def test_numbers_on_their_way_to_a_chart():
    assert smooth([(1, 2.0), (2, None), (3, 2.0)], 5) == [(1, 2.0), (2, None), (3, 2.0)]
    line = [(float(x), 9.0 if x == 501 else 1.0) for x in range(5000)]
    assert {line[0], line[501], line[-1]} <= set(thin(line))
    assert len(thin(line)) <= 810
    assert ticks(0.0, 0.0)[0] == 0
    assert [has_spikes(v) for v in ([1.0, 1.0, 100.0], [0.0, 1.0, 100.0], [])] == [True, False, False]


def browse(page: Path, *arguments: str) -> str:
    assert CHROMIUM
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile]
    command += ["--window-size=1280,5000", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_draws_curves_and_maps_and_nothing_sticks_out(written, tmp_path, width):
    # A copy that may run a script measures itself. A window of Chromium has at least 500 pixels, a body not.
    style = f"<style>body {{ width: {width}px }}</style>"
    script = "<script>document.title = [document.body.scrollWidth, innerWidth]</script>"
    text = written.read_text(encoding="utf-8").replace("</body>", style + "</body>")
    narrow, measuring = tmp_path / "narrow.html", tmp_path / "measuring.html"
    narrow.write_text(text, encoding="utf-8")
    text = text.replace("Content-Security-Policy", "x").replace("</body>", script + "</body>")
    measuring.write_text(text, encoding="utf-8")
    assert f"<title>{width},1280</title>" in browse(measuring, "--dump-dom")

    browse(narrow, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))

    def where(color: tuple[int, int, int]) -> np.ndarray:
        return (pixels == color).all(axis=-1)

    # The legends and the scale alone have fewer.
    assert min(where((0, 34, 78)).sum(), where((254, 232, 56)).sum()) > 1000
    for color in ((0, 114, 178), (213, 94, 0)):
        assert where(color).any(axis=0).sum() > width // 3
