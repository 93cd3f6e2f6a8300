"""Which node of a job is sick: what every task says of its node, and what follows from all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["started", "looked", "connected", "reduced"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one task says.

    Attributes:
        node: where it runs.
        rank: its number.
        stage: how far it came: it runs; it has looked at its node; it reached the first node; an all-reduce
            over all tasks ended.
        facts: what must be the same everywhere, by name.
        problems: what no run can work with, by name.
    """

    node: str
    rank: int
    stage: Stage
    facts: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What follows.

    Attributes:
        mistake: what is wrong on every node alike, so that no other node would help; empty where nothing is.
        sick: nodes to leave out, and why.
        note: what is wrong without telling where; empty where nothing is.
    """

    mistake: str = ""
    sick: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether training can begin."""
        return not (self.mistake or self.sick or self.note)


def judge(reports: Sequence[Report], nodes: Sequence[str], tasks_per_node: int, stage: Stage) -> Verdict:
    """Tells sick nodes from a mistake that every node shows.

    Args:
        reports: the latest of every task that was heard of.
        nodes: the job's nodes.
        tasks_per_node: tasks of each.
        stage: how far every task should have come: ``looked`` or ``reduced``.
    """
    of = {node: [report for report in reports if report.node == node] for node in nodes}
    sick: dict[str, str] = {}
    for node, found in of.items():
        if len(found) < tasks_per_node:
            sick[node] = f"{tasks_per_node - len(found)} of {tasks_per_node} tasks did not start"
        elif any(report.stage == "started" for report in found):
            sick[node] = "did not finish looking at itself"
    heard = [node for node in nodes if node not in sick]
    for name in dict.fromkeys(name for report in reports for name in report.problems):
        texts = {
            node: next(report.problems[name] for report in of[node] if name in report.problems)
            for node in heard
            if any(name in report.problems for report in of[node])
        }
        if heard and len(texts) == len(heard):
            return Verdict(mistake=f"{texts[heard[0]]} ({name}, on every node)")
        for node, text in texts.items():
            sick.setdefault(node, f"{name}: {text}")
    for node, difference in _odd_ones({node: of[node] for node in heard}).items():
        sick.setdefault(node, difference)
    if sick or stage == "looked":
        return Verdict(sick=sick)
    return _judge_communication(of)


def _odd_ones(of: dict[str, list[Report]]) -> dict[str, str]:
    """Nodes that differ from most; where as many are of one kind as of another, from the first."""
    odd: dict[str, str] = {}
    for name in dict.fromkeys(name for found in of.values() for report in found for name in report.facts):
        values = {
            node: " and ".join(sorted({report.facts.get(name, "none") for report in found}))
            for node, found in of.items()
        }
        # most_common keeps the order of those that are equally common.
        common = Counter(values.values()).most_common(1)[0][0]
        for node, value in values.items():
            if value != common:
                odd.setdefault(node, f"{name}: {value}, elsewhere {common}")
    return odd


def _judge_communication(of: dict[str, list[Report]]) -> Verdict:
    behind = [node for node, found in of.items() if any(report.stage != "reduced" for report in found)]
    cut_off = [node for node in behind if any(report.stage == "looked" for report in of[node])]
    first = next(iter(of))
    if cut_off and len(cut_off) < len(of):
        return Verdict(sick=dict.fromkeys(cut_off, f"does not reach {first}"))
    if behind and len(behind) < len(of):
        return Verdict(sick=dict.fromkeys(behind, "did not end an all-reduce that ended elsewhere"))
    if behind:
        return Verdict(note="an all-reduce over all nodes did not end; the ranks' logs have its messages")
    return Verdict()
