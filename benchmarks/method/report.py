"""Tables and plots of what `sweep.py` has run.

    python benchmarks/method/report.py --task scenes [--device cuda] [--arms WORD ...] [--plots DIR]
    python benchmarks/method/report.py --gather runs/method

Prints the learning rates tried, the arms' means over seeds, and how far each is from DEHVF as shipped after
as many steps of as many rows, paired by seed. Reads `results.jsonl` beside this file, a line a run, into
which `--gather` puts new runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import read_arm
from matplotlib.figure import Figure
from tasks import TASKS, Split

RESULTS = Path(__file__).with_name("results.jsonl")
SHIPPED = "ffn"
TUNING = "val"
LOWER_IS_BETTER = "loss"
LEFT_OUT = ("output", "answers")
NUM_BLOCKS = 12
"""of the tower"""

Run = dict[str, Any]
Group = tuple[str, tuple[int, int]]
"""An arm; steps, and rows of a step."""


def main() -> None:
    """Prints the tables, draws the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that they ran on")
    parser.add_argument("--arms", nargs="+", default=[".*"], help="expressions, one of which an arm matches")
    parser.add_argument("--plots", type=Path, help="directory of the pictures; none are drawn without")
    parser.add_argument("--gather", type=Path, help="directory of new runs")
    args = parser.parse_args()
    if args.gather:
        gather(args.gather, RESULTS)
    if args.task:
        runs = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        wanted = [*args.arms, SHIPPED]
        runs = [
            run
            for run in runs
            if (run["task"], run["device"]) == (args.task, args.device)
            and any(re.fullmatch(word, run["arm"]) for word in wanted)
        ]
        columns = ("loss", *TASKS[args.task].columns)
        tables = [rates(runs), means(columns, runs), differences(columns, runs), abouts(runs)]
        print("\n\n".join("\n".join(table) for table in tables))
        if args.plots:
            args.plots.mkdir(parents=True, exist_ok=True)
            for name, figure in figures(columns, runs):
                figure.savefig(args.plots / f"{args.task}-{args.device}-{name}.png", dpi=110)


def gather(directory: Path, to: Path) -> None:
    """Puts the runs of a directory into the file, in the place of those of the same names; scores answers."""
    known = {}
    for text in to.read_text(encoding="utf-8").splitlines() if to.is_file() else ():
        run = json.loads(text)
        known[_key(run)] = run
    for path in sorted(directory.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        task = TASKS[run["task"]]
        if "answers" in run and task.columns[0] not in run:
            run |= task.score(Split(task, run["split"], run["seed"]), run["answers"])
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
        known[_key(run)] = {name: _short(value) for name, value in run.items() if name not in LEFT_OUT}
    lines = (json.dumps(known[key]) + "\n" for key in sorted(known))
    to.write_text("".join(lines), encoding="utf-8")


def _key(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("task", "device", "arm", "steps", "rows", "lr", "seed", "split"))


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) and value > 0.001 else value


def rates(runs: Sequence[Run]) -> Iterator[str]:
    """Loss a token on the validation split, with seed 0, by arm and learning rate."""
    tuned = [run for run in runs if run["split"] == TUNING and run["seed"] == 0]
    tried = sorted({run["lr"] for run in tuned})
    yield "| validation loss, seed 0 | steps | " + " | ".join(f"{lr:g}" for lr in tried) + " |"
    yield "|---|---|" + "---|" * len(tried)
    for group in groups(tuned):
        found = {run["lr"]: run["loss"] for run in tuned if _group(run) == group}
        best = min(found.values())
        cells = [_bold(f"{found[lr]:.3f}", found[lr] == best) if lr in found else "" for lr in tried]
        yield f"| {_name(group)} | " + " | ".join(cells) + " |"


def means(columns: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """Means and standard deviations over seeds, on the test split; of one CPU thread, the time."""
    timed = runs[0]["device"] == "cpu" if runs else False
    heads = ["test, mean ± SD over seeds", "steps", "seeds", "lr", "trained", *["CPU s"] * timed, *columns]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for group in groups(measured(runs)):
        found = list(by_seed(runs, group).values())
        seconds = found[0]["steps"] * statistics.median(run["step_cpu_s"] for run in found)
        head = [_name(group), len(found), f"{found[0]['lr']:g}", f"{found[0]['trained'] / 1e6:.2f} M"]
        cells = [spread([run[column] for run in found]) for column in columns]
        yield "| " + " | ".join(map(str, [*head, *[f"{seconds:.0f}"] * timed, *cells])) + " |"


def differences(columns: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """How much better an arm is than DEHVF as shipped, paired by seed; bold where beyond two deviations."""
    yield f"| better than `{SHIPPED}` by | steps | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for group in groups(measured(runs)):
        found, base = by_seed(runs, group), by_seed(runs, (SHIPPED, group[1]))
        pairs = [(found[seed], base[seed]) for seed in sorted(found.keys() & base.keys())]
        if group[0] != SHIPPED and pairs:
            cells = []
            for column in columns:
                sign = -1 if column == LOWER_IS_BETTER else 1
                values = [sign * (one[column] - other[column]) for one, other in pairs]
                beyond = len(values) > 2 and abs(statistics.mean(values)) > 2 * statistics.stdev(values)
                cells.append(_bold(spread(values), beyond))
            yield f"| {_name(group)} | " + " | ".join(cells) + " |"


def abouts(runs: Sequence[Run]) -> Iterator[str]:
    """What the arms are."""
    for name in dict.fromkeys(name for name, _ in groups(runs)):
        yield f"- `{name}`: {read_arm(name).about}"


def measured(runs: Sequence[Run]) -> list[Run]:
    """Runs on the test split."""
    return [run for run in runs if run["split"] != TUNING]


def by_seed(runs: Sequence[Run], group: Group) -> dict[int, Run]:
    """Test runs of a group."""
    return {run["seed"]: run for run in measured(runs) if _group(run) == group}


def groups(runs: Sequence[Run]) -> list[Group]:
    """What was run, the arms of the product first."""

    def order(group: Group) -> tuple[Any, ...]:
        name, schedule = group
        number = int(re.sub(r"\D", "", name) or 0)
        return name.startswith("x-"), name != SHIPPED, re.sub(r"\d", "", name), number, schedule

    return sorted({_group(run) for run in runs}, key=order)


def _group(run: Run) -> Group:
    return run["arm"], (run["steps"], run["rows"])


def _name(group: Group, between: str = " | ") -> str:
    name, (steps, rows) = group
    return f"{name}{between}{steps} x {rows}"


def _only_level(group: Group) -> int | None:
    """The block of the tower that an arm reads alone; None if it reads several, or none."""
    model = read_arm(group[0]).model
    if model["fusion"] != "ffn" or model.get("router") != "last":
        return None
    return model.get("feature_layers", [NUM_BLOCKS])[-1]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    digits = 1 if max(map(abs, values)) > 10 else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _bold(text: str, really: bool) -> str:
    return f"**{text}**" if really else text


def figures(columns: Sequence[str], runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """What each arm has right, the levels that the router weighs, and the losses on the way."""
    kinds = [column for column in columns if column not in (LOWER_IS_BETTER, "CIDEr")]
    shown = groups(measured(runs))
    if not shown:
        return
    if kinds:
        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots()
        for number, group in enumerate(shown):
            found = list(by_seed(runs, group).values())
            places = [place + (number - len(shown) / 2) * 0.8 / len(shown) for place in range(len(kinds))]
            every = [[run[kind] for run in found] for kind in kinds]
            spans = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in every]
            centers = [statistics.mean(values) for values in every]
            style = "o" if number < 10 else "s"
            label = {"label": group[0] if group[1] == shown[0][1] else _name(group, ", ")}
            axes.errorbar(places, centers, yerr=spans, fmt=style, markersize=4, capsize=2, **label)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_ylabel("right, 0 to 1")
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside right upper")
        yield "kinds", figure
    routed = [group for group in shown if "weights" in next(iter(by_seed(runs, group).values()))]
    # A mean's are frozen.
    routed = [group for group in routed if not read_arm(group[0]).frozen]
    routed = [group for group in routed if read_arm(group[0]).model.get("router") in ("layer", "static")]
    if routed:
        figure = Figure(figsize=(2.6 * len(routed) + 1, 4.2), layout="constrained")
        for axes, group in zip(figure.subplots(1, len(routed), squeeze=False)[0], routed, strict=True):
            weights = torch.tensor([run["weights"] for run in by_seed(runs, group).values()]).mean(dim=0)
            image = axes.imshow(weights, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
            levels = weights.shape[1]
            axes.set_xticks(range(levels), [NUM_BLOCKS * (level + 1) // levels for level in range(levels)])
            axes.set(title=group[0], xlabel="feature layer", ylabel="LLM layer")
            figure.colorbar(image, ax=axes)
        yield "levels", figure
    alone = sorted((depth, group) for group in shown if (depth := _only_level(group)))
    if kinds and len(alone) > 2:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for kind in kinds:
            means = [
                statistics.mean(run[kind] for run in by_seed(runs, group).values()) for _, group in alone
            ]
            axes.plot([depth for depth, _ in alone], means, "o-", markersize=4, label=kind)
        axes.set(xlabel="block of the tower, read alone", ylabel="right, 0 to 1")
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside right upper")
        yield "depth", figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(shown):
        curves = torch.tensor([run["losses"] for run in by_seed(runs, group).values()])
        places = range(0, 10 * curves.shape[1], 10)
        axes.plot(places, curves.mean(dim=0), "-" if number < 10 else "--", label=_name(group, ", "))
    axes.set(xlabel="step", ylabel="training loss a token, one step in ten", yscale="log")
    figure.legend(loc="outside right upper")
    yield "losses", figure


if __name__ == "__main__":
    main()
