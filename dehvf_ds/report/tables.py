"""Tables of several runs side by side: what they were, how they differ, what they scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from string import ascii_uppercase
from xml.etree.ElementTree import Element

from dehvf_ds.evaluation.coco import CAPTION_METRICS
from dehvf_ds.evaluation.scienceqa import COLUMNS
from dehvf_ds.report.markup import Child, tag
from dehvf_ds.report.runs import Evaluation, Run, differing, finite, shown
from dehvf_ds.report.series import number, spread

NUM_EXAMPLES = 8
NONE = "—"

# Each run names itself in the settings; the table's head says it.
_OWN_SETTINGS = ("run_dir", "overwrite")


def overview(runs: Sequence[Run]) -> Element:
    """A row a run: steps, losses, speed, and what went wrong."""
    head = ("run", "steps", "samples", "last train loss", "best val loss", "median samples/s", "remarks")
    return _table(head, [_overview_row(run) for run in runs], text_columns=(0, 6))


def settings_that_differ(runs: Sequence[Run]) -> Element:
    """A row a setting, a column a run: differing settings open, the rest folded."""
    columns = [_without(run.settings, _OWN_SETTINGS) for run in runs]
    names = differing(columns)
    names_all = dict.fromkeys(name for column in columns for name in column)
    head = ("setting", *(run.name for run in runs))
    texts = range(len(head))
    same = [(name, columns[0][name]) for name in names_all if name not in names]
    if names:
        rows = [(name, *(column.get(name, NONE) for column in columns)) for name in names]
        first = _table(head, rows, texts)
    else:
        first = tag("p", "All settings are the same." if len(runs) > 1 else "One run: nothing to compare.")
    folded = tag(
        "details",
        tag("summary", f"{len(same)} settings that are the same" if len(runs) > 1 else "its settings"),
        _table(("setting", "value"), same, (0, 1)),
    )
    return tag("div", first, folded if same else None)


def scores(runs: Sequence[Run], task: str) -> Element:
    """A row an evaluation of ``task``; what keeps them from being compared is said below."""
    found = [(run, e) for run in runs for e in run.evaluations if e.task == task]
    names = _score_names([e for _, e in found], task)
    losses = ["loss"] if any("loss" in e.metrics for _, e in found) else []
    head = ("run", "split", *names, *losses, "rows")
    rows = []
    for run, evaluation in found:
        marks = "" if evaluation.metrics.get("comparable", True) else " †"
        rows.append(
            (
                run.name + marks,
                evaluation.label,
                *(_score(evaluation, name) for name in names),
                *(_cell(evaluation.metrics.get(name), 4) for name in losses),
                shown(evaluation.metrics.get("num_samples", NONE)),
            )
        )
    terms = [evaluation.terms() for _, evaluation in found]
    differ = differing(terms)
    notes: list[Child] = []
    if any(" †" in row[0] for row in rows):
        notes.append(
            tag("p", "† not comparable with published numbers: not COCO's tokenizer.", class_="warning")
        )
    for run, evaluation in found:
        label = f"{run.name}, {evaluation.label}"
        notes += [tag("p", f"{label}: {text}", class_="note") for text in _weak_rows(evaluation)]
        missing = evaluation.metrics.get("missing")
        for name, reason in missing.items() if isinstance(missing, dict) else ():
            notes.append(tag("p", f"{label}: without {name}: {reason}", class_="note"))
    if differ and len(found) > 1:
        labels = [f"{run.name}, {evaluation.label}" for run, evaluation in found]
        notes.append(
            tag("p", "‡ Not all of these rows compare with each other. They differ in:", class_="warning")
        )
        values = [(name, *(_short(column.get(name, NONE)) for column in terms)) for name in differ]
        notes.append(_table(("", *labels), values, range(len(labels) + 1)))
        head = ("run ‡", *head[1:])
    return tag("div", _table(head, rows, (0, 1)), *notes)


def examples(evaluations: Sequence[tuple[Run, Evaluation]], task: str) -> Element | None:
    """Some rows of the same data: references or the right answer, and what each run says; None without any.

    Args:
        evaluations: of one task, split and data: keys of other data may be the same, and are other rows.
        task: of all of them.
    """
    evaluations = [(run, e) for run, e in evaluations if e.predictions]
    if not evaluations:
        return None
    names = Counter(run.name for run, _ in evaluations)
    lines = evaluations[0][1].predictions
    by_key = [
        (
            run.name if names[run.name] == 1 else f"{run.name}, {e.label}",
            {shown(line["key"]): line for line in e.predictions},
        )
        for run, e in evaluations
    ]
    body = []
    for index in spread(len(lines), NUM_EXAMPLES):
        key = shown(lines[index]["key"])
        said = [(name, answers[key]) for name, answers in by_key if key in answers]
        for place, (name, line) in enumerate(said):
            first = place == 0
            body.append(
                tag(
                    "tr",
                    tag("th", key, rowspan=len(said), scope="rowgroup") if first else None,
                    tag("td", *_truth(lines[index]), rowspan=len(said)) if first else None,
                    tag("td", name, class_="run"),
                    tag("td", _letter(line.get("prediction")), class_="said"),
                    tag("td", *_line_scores(line), class_="note"),
                    class_="group" if first else None,
                )
            )
    head = ("row", "references" if task == "coco" else "right", "run", "answer", "scores")
    return _framed(head, body, range(5))


def _overview_row(run: Run) -> tuple[str, ...]:
    losses = [value for _, value in run.curve("train/loss")]
    known = [value for value in losses if value is not None]
    validated = [(value, step) for step, value in run.curve("val/loss") if value is not None]
    speeds = [value for _, value in run.curve("samples_per_s") if value is not None]
    last = run.rows[-1] if run.rows else {}
    remarks = list(run.notes)
    if len(known) < len(losses):
        remarks.append(f"{len(losses) - len(known)} steps with a loss that is not finite")
    if finite(last.get("skipped")):
        remarks.append(f"{last['skipped']} steps skipped")
    best = min(validated, default=None)
    return (
        run.name,
        str(last.get("step", 0)),
        shown(last.get("samples", NONE)),
        f"{known[-1]:.4f}" if known else NONE,
        f"{best[0]:.4f} (step {best[1]})" if best else NONE,
        number(median(speeds), 3) if speeds else NONE,
        "; ".join(remarks) or NONE,
    )


def _weak_rows(evaluation: Evaluation) -> list[str]:
    """Rows that count but say little, in words."""
    told = (
        ("num_empty", "empty captions, which are scored"),
        ("num_image_missing", "pictures missing"),
        ("num_unreadable", "pictures that could not be read, which count as empty answers"),
    )
    numbers = [(finite(evaluation.metrics.get(name)), text) for name, text in told]
    return [f"{text}: {value:.0f}" for value, text in numbers if value]


def _score_names(evaluations: Sequence[Evaluation], task: str) -> list[str]:
    """The papers' columns for the two tasks; of captions those that any run has."""
    if task == "scienceqa":
        return [*COLUMNS, "parse failures"]
    return [
        name for name in CAPTION_METRICS if any(finite(e.metrics.get(name)) is not None for e in evaluations)
    ]


def _score(evaluation: Evaluation, name: str) -> str:
    if name == "parse failures":
        rate = finite(evaluation.metrics.get("parse_failure_rate"))
        return NONE if rate is None else f"{rate:.2f} %"
    accuracy = evaluation.metrics.get("accuracy")
    source = accuracy if isinstance(accuracy, dict) else evaluation.metrics
    return _cell(source.get(name), 2)


def _cell(value: object, decimals: int) -> str:
    known = finite(value)
    return NONE if known is None else f"{known:.{decimals}f}"


def _truth(line: dict[str, object]) -> list[Child]:
    references = line.get("references")
    if isinstance(references, list):
        return [tag("ul", *(tag("li", _text(text)) for text in references), class_="references")]
    return [_letter(line.get("answer"))]


def _letter(value: object) -> str:
    """The letter of a choice, as the problem shows it, from its number."""
    if isinstance(value, int) and 0 <= value < len(ascii_uppercase):
        return ascii_uppercase[value]
    return _text(value)


def _line_scores(line: dict[str, object]) -> list[Child]:
    found = line.get("scores")
    if isinstance(found, dict):
        known = [(name, finite(value)) for name, value in found.items()]
        return [tag("div", f"{name} {value:.1f}") for name, value in known if value is not None]
    if "choice" not in line:
        return []
    if line["choice"] is None:
        return ["names no choice"]
    return ["right" if line["choice"] == line.get("answer") else "wrong"]


def _text(value: object) -> str:
    return NONE if value in (None, "") else shown(value)


def _short(value: str) -> str:
    # The head of a hash is enough to tell two apart.
    return value[:12] + "…" if len(value) == 64 and " " not in value else value


def _without(settings: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in names}


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] | range
) -> Element:
    body = []
    for row in rows:
        cells = [
            tag("th" if i == 0 else "td", value, class_=None if i in text_columns else "number")
            for i, value in enumerate(row)
        ]
        body.append(tag("tr", *cells))
    return _framed(head, body, text_columns)


def _framed(head: Sequence[str], body: Sequence[Element], text_columns: Sequence[int] | range) -> Element:
    names = [
        tag("th", name, scope="col", class_=None if i in text_columns else "number")
        for i, name in enumerate(head)
    ]
    # A wide table scrolls by itself; the page does not.
    table = tag("table", tag("thead", tag("tr", *names)), tag("tbody", *body))
    return tag("div", table, class_="wide")
