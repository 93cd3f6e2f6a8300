"""A YAML file of settings, read strictly: no key twice, no value lost to a comment, text as it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dehvf_ds.config.errors import UserError
from dehvf_ds.config.kinds import Kind, Setting
from dehvf_ds.config.values import item_kinds, parse_text

_NULLS = ("", "~", "null", "Null", "NULL")
_MERGE = "tag:yaml.org,2002:merge"
_SCALARS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")
}


def read_settings(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Reads the values that a YAML file gives, by dotted name.

    What a scalar means is told by the setting, not by YAML 1.1: ``1e-3`` is a number for ``train.lr`` and
    ``yes`` a text for ``data.prompt``.

    Args:
        path: the file.
        settings: those that it may give.

    Raises:
        UserError: it cannot be read, or names a key that is not known, stands there twice or has no value of
            its kind; tells file and line.
    """
    return _File(path, settings).values()


def suggestion(name: str, known: Mapping[str, Any]) -> str:
    """Ends a message about a name that is not known: the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        last = name.rpartition(".")[2]
        near = [other for other in known if other.rpartition(".")[2] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""


class _File:
    def __init__(self, path: Path, settings: Mapping[str, Setting]) -> None:
        self._path, self._settings = path, settings
        try:
            text = path.read_text(encoding="utf-8-sig")
            self._root = yaml.compose(text, Loader=yaml.SafeLoader)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a YAML file (its bytes are no UTF-8)") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}{_place(error)}: {_problem(error)}") from None
        except RecursionError:
            raise UserError(f"{path}: brackets too deep in each other") from None
        self._lines = text.splitlines()

    def values(self) -> dict[str, Any]:
        if self._root is None:
            return {}
        found: dict[str, Any] = {}
        self._section(self._root, "", found)
        return found

    def _section(self, node: yaml.Node, prefix: str, found: dict[str, Any]) -> None:
        name = prefix.removesuffix(".")
        if isinstance(node, yaml.ScalarNode) and node.style is None and not node.value:
            return  # a section of which all lines are commented out
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{name or 'the file'} is not a section of `name: value` lines")
        for key, value in self._pairs(node, name).items():
            full = prefix + key
            if full in found:
                # As a dotted name and in its section.
                raise self._error(value, f"{full} stands there a second time; keep one")
            if full in self._settings:
                found[full] = self._value(self._settings[full].kind, value, full)
            elif any(known.startswith(full + ".") for known in self._settings):
                self._section(value, full + ".", found)
            else:
                raise self._error(value, f"no setting {full}{suggestion(full, self._settings)}")

    def _pairs(
        self, node: yaml.MappingNode, name: str, within: tuple[yaml.MappingNode, ...] = ()
    ) -> dict[str, yaml.Node]:
        """The values of a section by key; those of merged sections (``<<``) behind its own."""
        lines: dict[str, int] = {}
        own: dict[str, yaml.Node] = {}
        merged: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key is not a word")
            line = key.start_mark.line + 1
            if key.value in lines:
                full = f"{name}.{key.value}" if name else key.value
                raise UserError(
                    f"{self._path}: {full} stands there twice, in line {lines[key.value]} and in line "
                    f"{line}; keep one"
                )
            lines[key.value] = line
            if key.tag == _MERGE:
                for other in self._merged(value):
                    if other in within or other is node:
                        raise self._error(key, "<< takes another section, not one that it stands in")
                    merged = self._pairs(other, name, (*within, node)) | merged
            else:
                own[key.value] = value
        return merged | own

    def _merged(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for other in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(other, yaml.MappingNode):
                raise self._error(node, "<< takes a section")
            yield other

    def _value(self, kind: Kind, node: yaml.Node, name: str) -> Any:
        place = f"{self._path}, line {node.start_mark.line + 1}: {name}"
        if isinstance(node, yaml.SequenceNode):
            if kind.base != "list":
                raise UserError(f"{place} is a list, and takes one value; put it in quotes if it is a text")
            kinds = item_kinds(kind, len(node.value), place)
            items = [self._value(item, child, name) for item, child in zip(kinds, node.value, strict=True)]
            return tuple(items) if kind.is_tuple else items
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(f"{place} is a section, and takes a value; put it in quotes if it is a text")
        if node.tag not in _SCALARS:
            raise UserError(f"{place}: the tag {node.tag} is not known here")
        if node.style is None and node.value in _NULLS:
            return self._nothing(kind, node, place)
        return parse_text(kind, node.value, place)

    def _nothing(self, kind: Kind, node: yaml.ScalarNode, place: str) -> None:
        if not node.value and self._rest(node.start_mark).strip().startswith("#"):
            raise UserError(
                f"{place} has no value: # begins a comment; put a text that begins with # in quotes, "
                "or write null for none"
            )
        if not kind.optional:
            raise UserError(f"{place} needs a value")

    def _rest(self, mark: yaml.Mark) -> str:
        """The line from a place on."""
        return self._lines[mark.line][mark.column :] if mark.line < len(self._lines) else ""

    def _error(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f"{self._path}, line {node.start_mark.line + 1}: {message}")


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"no YAML: {' '.join(str(problem).split())}"
