"""The model card of an export: what it is made of, how it was trained and scored, how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dehvf_ds.config import UserError, load_run_config
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.export import snippets
from dehvf_ds.export.licences import stated_licence
from dehvf_ds.model import DehvfConfig
from dehvf_ds.model.artifact import read_manifest
from dehvf_ds.model.stored import StoredFile
from dehvf_ds.model.weights import TrainedModel

Form = Literal["merged", "unfolded", "adapter"]
"""Adapters folded into the weights, beside them, or without the base models' weights."""

PAPER = "https://arxiv.org/abs/2508.17638"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_METHODS = {
    "ffn": (
        "DEHVF: features from several depths of the tower, weighed for each layer of the language model, are "
        "key/value memory in that layer's FFN. No visual token enters the sequence."
    ),
    "prefix": "Projected patches of the picture stand before the text (the baseline `prefix`).",
    "none": "It sees no picture (the baseline `none`): pictures are accepted and change nothing.",
}
_FORMS = {
    "merged": "The FFN adapters are folded into the weights.",
    "unfolded": "The FFN adapters are kept apart from the weights, in fp32.",
    "adapter": "It holds what was trained alone, and goes onto the base models that it was trained on.",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is written of.

    Attributes:
        form: how the export holds the adapters.
        dtype: of the weights, as ``bfloat16``; None for an adapter.
        bases: names of the language model and the vision tower, without the paths of a machine.
        licences: what each base states, in the same order.
        config: the model's configuration.
        task: what it was trained for.
        num_trained: parameters that were trained.
        training: more of the training, by name.
        evaluations: content of each ``metrics.json``, by ``TASK-SPLIT``.
    """

    form: Form
    dtype: str | None
    bases: tuple[str, str]
    licences: tuple[Mapping[str, str], Mapping[str, str]]
    config: DehvfConfig
    task: str
    num_trained: int
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def collect_facts(
    trained: TrainedModel, run_dir: Path | None, *, dtype: torch.dtype | None, form: Form
) -> Facts:
    """Reads what is known of a trained model.

    Args:
        trained: an adapter artifact with its base models.
        run_dir: the run that it lies in, for settings and scores; None where it lies in none.
        dtype: of the exported weights; None for an adapter.
        form: of the export.
    """
    manifest = read_manifest(trained.path)
    sources = [str(trained.language_model), str(trained.vision_tower)]
    names = [manifest["bases"][kind]["path"] for kind in ("language_model", "vision_tower")]
    training = {name: manifest[name] for name in ("step", "samples") if name in manifest}
    if run_dir is not None:
        training |= _settings(run_dir)
    return Facts(
        form=form,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        bases=(_public_name(names[0]), _public_name(names[1])),
        licences=(stated_licence(sources[0]), stated_licence(sources[1])),
        config=trained.config,
        task=trained.task or "caption",
        num_trained=_count_trained(trained.path),
        training=training,
        evaluations={} if run_dir is None else _evaluations(run_dir),
    )


def model_card(facts: Facts) -> str:
    """The card, Markdown with YAML front matter as model hubs read it."""
    config = facts.config
    prompt = CAPTION_PROMPT if config.prompt is None and facts.task == "caption" else config.prompt
    what = [_METHODS[config.fusion], _FORMS[facts.form]]
    if facts.dtype is not None:
        what.append(f"Weights: {facts.dtype}.")
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False)}---",
        f"# {facts.bases[0].rpartition('/')[2]} that sees through {facts.bases[1].rpartition('/')[2]}",
        f"{' '.join(what)} Trained with dehvf_ds after [DEHVF]({PAPER}).",
        _bases_section(facts),
        "## Training\n\n" + _bullets(_training_lines(facts)),
        "## Evaluation\n\n" + _evaluation_section(facts.evaluations),
        "## How to load it\n\n" + snippets.loading(facts.form, prompt, facts.bases),
        "## Limits\n\nOne picture a prompt, or none. It was tuned for the task above and on the data above; "
        "what it says of other pictures was not measured unless a table here says so.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts) -> dict[str, Any]:
    on_hub = [name for name in facts.bases if _HUB_ID.fullmatch(name)]
    # The language model's decides: it is nearly all of the weights.
    stated = dict(facts.licences[0])
    if not stated:
        stated = {"license": "other", "license_name": "of-the-base-models"}
    matter: dict[str, Any] = {"library_name": "dehvf_ds" if facts.form == "adapter" else "transformers"}
    matter |= {"pipeline_tag": "image-text-to-text", **stated}
    if on_hub:
        relation = "adapter" if facts.form == "adapter" else "finetune"
        matter |= {"base_model": on_hub, "base_model_relation": relation}
    return matter | {"tags": ["dehvf", "vision-language", facts.task]}


def _bases_section(facts: Facts) -> str:
    lines = []
    for kind, name, stated in zip(
        ("language model", "vision tower"), facts.bases, facts.licences, strict=True
    ):
        licence = stated.get("license_name") or stated.get("license") or "not stated in its directory"
        link = f" ({stated['license_link']})" if "license_link" in stated else ""
        lines.append(f"{kind}: {name}; licence: {licence}{link}")
    held = (
        "It changes them and does not hold them; whoever uses both keeps to the licences of both."
        if facts.form == "adapter"
        else "Their weights are in this directory, so their licences hold for it. Texts that came with them "
        "are in `licences/`."
    )
    return "## Base models\n\n" + _bullets(lines) + f"\n\n{held}"


def _training_lines(facts: Facts) -> list[str]:
    config = facts.config
    lines = [f"task: {facts.task}", f"trained parameters: {facts.num_trained:,}; all others are frozen"]
    if config.fusion == "ffn":
        lines.append(f"router `{config.router}` over levels {config.levels}, rank {config.rank}")
    if config.lora is not None:
        targets = ", ".join(config.lora["targets"])
        lines.append(
            f"FFN adapters: LoRA of rank {config.lora['rank']}, alpha {config.lora['alpha']:g}, on {targets}"
        )
    return lines + [f"{name}: {value}" for name, value in facts.training.items()]


def _evaluation_section(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    if not evaluations:
        return "None came with the checkpoint."
    return "\n\n".join(_evaluation(name, metrics) for name, metrics in evaluations.items())


def _evaluation(name: str, metrics: Mapping[str, Any]) -> str:
    scores = metrics.get("accuracy")
    if not isinstance(scores, Mapping):
        scores = {n: v for n, v in metrics.items() if isinstance(v, float) and n[:1].isupper()}
    protocol = metrics.get("protocol")
    terms = {**protocol} if isinstance(protocol, Mapping) else {}
    if isinstance(metrics.get("decoding"), Mapping):
        terms |= metrics["decoding"]
    said = [f"{_cell(n)} {_cell(v)}" for n, v in terms.items() if isinstance(v, str | int | float | bool)]
    lines = [
        f"**{_cell(name)}**, {metrics.get('num_samples', 'unknown')} samples",
        _table(list(scores), [f"{v:.2f}" if isinstance(v, float) else _cell(v) for v in scores.values()]),
    ]
    if said:
        lines.append(f"Protocol: {'; '.join(said)}.")
    return "\n\n".join(lines)


def _table(head: Sequence[str], row: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), row]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(str(line).split())}" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def _settings(run_dir: Path) -> dict[str, Any]:
    try:
        config = load_run_config(run_dir / "config.yaml")
    except UserError:
        return {}  # written by another version
    return {
        "data": "/".join(Path(config.data.train).parts[-2:]),
        "batch size": config.train.global_batch_size,
        "learning rate": config.train.lr,
        "seed": config.seed,
    }


def _evaluations(run_dir: Path) -> dict[str, Mapping[str, Any]]:
    found = {}
    for path in sorted(run_dir.glob("eval/*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(metrics, dict):
            found[path.parent.name] = metrics
    return found


def _public_name(source: str) -> str:
    """A hub id as it is, of a directory its last component: a card goes where its path means nothing."""
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else Path(source).name


def _count_trained(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*.safetensors"):
        with StoredFile(path) as file:
            total += sum(stored.num_elements for stored in file.tensors.values())
    return total
