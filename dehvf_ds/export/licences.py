"""What the base models say of their licences; an export holds their weights, so it stands under them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import cached_file

_LICENCE_FILE = re.compile(r"^(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def stated_licence(source: str) -> dict[str, str]:
    """``license``, and where given ``license_name`` and ``license_link``, of a base model.

    Args:
        source: directory or hub id; of a hub id what the local cache holds.

    Returns:
        As the model card's front matter has them, or ``source.json`` of ``prepare_backbones.py``; empty where
        nothing is stated.
    """
    directory = _directory(source)
    if directory is None:
        return {}
    found: Any = None
    if card := _text(directory / "README.md"):
        match = _FRONT_MATTER.match(card)
        try:
            found = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError:
            found = None
    if not isinstance(found, dict) or "license" not in found:
        try:
            found = json.loads(_text(directory / "source.json") or "null")
        except ValueError:
            found = None
    if not isinstance(found, dict):
        return {}
    names = ("license", "license_name", "license_link")
    stated = {name: found[name] for name in names if isinstance(found.get(name), str)}
    # Hubs know licences by lower-case identifiers.
    return stated | ({"license": stated["license"].lower()} if "license" in stated else {})


def copy_licence_files(source: str, target: Path) -> list[str]:
    """Copies a base model's licence, notice and use policy.

    Args:
        source: directory or hub id; of a hub id what the local cache holds.
        target: directory, made where there is something to copy.

    Returns:
        Their names.
    """
    directory = _directory(source)
    if directory is None:
        return []
    files = [
        path for path in sorted(directory.iterdir()) if path.is_file() and _LICENCE_FILE.match(path.name)
    ]
    for path in files:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]


def _directory(source: str) -> Path | None:
    """Where a base's files lie on this machine."""
    if Path(source).is_dir():
        return Path(source)
    try:
        found = cached_file(source, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
