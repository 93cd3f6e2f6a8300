"""The model card of an export (``card.md.j2``): base models, licences, training, scores, how to load it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import yaml
from huggingface_hub import ModelCardData, metadata_load
from safetensors.torch import load_file
from transformers.utils import cached_file

from dehvf_ds.config import UserError, load_run_config
from dehvf_ds.data.prompts import CAPTION_PROMPT
from dehvf_ds.model.adapter import TrainedModel, read_manifest
from dehvf_ds.training.run_dir import RUN_CONFIG_FILE

Form = Literal["merged", "unfolded", "adapter"]
"""Adapters folded into the weights, apart from them, or without the base models' weights."""

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_FILE = re.compile(r"(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)


def model_card(trained: TrainedModel, run_dir: Path | None, *, form: Form, dtype: torch.dtype | None) -> str:
    """The card of an export, Markdown with front matter; with settings and scores of its run, if any.

    It names no path of this machine. Scores stay out of the front matter, where hubs would rank them beside
    those on the real COCO.
    """
    manifest, task = read_manifest(trained.path), trained.task or "caption"
    names = [_public_name(manifest["bases"][kind]["path"]) for kind in ("language_model", "vision_tower")]
    licences = [stated_licence(str(source)) for source in (trained.language_model, trained.vision_tower)]
    on_hub = [name for name in names if _HUB_ID.fullmatch(name)]
    # The language model's licence decides: nearly all of the weights are its own.
    stated = licences[0] or {"license": "other", "license_name": "of-the-base-models"}
    data = ModelCardData(
        library_name="dehvf_ds" if form == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        license=stated["license"],
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
        base_model=on_hub or None,
        base_model_relation=("adapter" if form == "adapter" else "finetune") if on_hub else None,
        tags=["dehvf", "vision-language", task],
    )
    usual_prompt = CAPTION_PROMPT if task == "caption" else "Your question"
    weights = [trained.path / name for name in manifest["files"] if name.endswith(".safetensors")]
    training = {name: manifest[name] for name in ("step", "samples") if name in manifest}
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"line": _line, "score": _score, "repr": repr}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=data.to_yaml(),
        bases=names,
        licences=licences,
        config=trained.config,
        form=form,
        dtype=str(dtype).removeprefix("torch."),
        task=task,
        num_trained=sum(tensor.numel() for path in weights for tensor in load_file(path).values()),
        training=training | (_settings(run_dir) if run_dir else {}),
        evaluations=_evaluations(run_dir) if run_dir else [],
        prompt=usual_prompt if trained.config.prompt is None else trained.config.prompt,
    )


def stated_licence(source: str) -> dict[str, str]:
    """``license``, and possibly ``license_name`` and ``license_link``, that a base states; {} if none.

    From the front matter of its model card, or ``source.json`` of ``prepare_backbones.py``.
    """
    directory = _directory(source)
    if directory is None:
        return {}
    for name, read in (("README.md", metadata_load), ("source.json", _read_json)):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # people write these by hand
            found: Any = read(directory / name)
            if isinstance(found, dict) and isinstance(found.get("license"), str):
                names = ("license", "license_name", "license_link")
                stated = {name: found[name] for name in names if isinstance(found.get(name), str)}
                return stated | {"license": stated["license"].lower()}  # as hubs name licences
    return {}


def copy_licence_files(trained: TrainedModel, target: Path) -> None:
    """Copies the base models' licences, notices and use policies."""
    for kind in ("language_model", "vision_tower"):
        directory = _directory(getattr(trained, kind))
        for path in directory.iterdir() if directory is not None else ():
            if path.is_file() and _LICENCE_FILE.match(path.name):
                (target / kind).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / kind / path.name)


def _directory(source: str) -> Path | None:
    """A base's directory on this machine; for a hub id, in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    try:
        found = cached_file(source, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _public_name(source: str) -> str:
    """A hub id, or the last component of a directory, whose path means nothing on other machines."""
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else Path(source).name


def _settings(run_dir: Path) -> dict[str, Any]:
    try:
        config = load_run_config(run_dir / RUN_CONFIG_FILE)
    except UserError:
        return {}  # written by another version
    return {
        "data": "/".join(Path(config.data.train).parts[-2:]),
        "batch size": config.train.global_batch_size,
        "learning rate": config.train.lr,
        "seed": config.seed,
    }


def _evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Name, scores and protocol of each evaluation of a run; damaged ones are left out."""
    found = []
    for path in sorted(run_dir.glob("eval/*/metrics.json")):
        metrics = None
        with contextlib.suppress(OSError, ValueError):
            metrics = _read_json(path)
        if not isinstance(metrics, dict):
            continue
        scores = metrics.get("accuracy")
        if not isinstance(scores, Mapping):
            scores = {name: v for name, v in metrics.items() if isinstance(v, float) and name[:1].isupper()}
        terms = {**(metrics.get("protocol") or {}), **(metrics.get("decoding") or {})}
        found.append(
            {
                "name": path.parent.name,
                "num_samples": metrics.get("num_samples", "unknown"),
                "scores": scores,
                "protocol": {n: v for n, v in terms.items() if not isinstance(v, Mapping | list | None)},
            }
        )
    return [evaluation for evaluation in found if evaluation["scores"]]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _line(value: Any) -> str:
    """On one line, and in one cell of a table."""
    return " ".join(str(value).split()).replace("|", r"\|")


def _score(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else _line(value)
