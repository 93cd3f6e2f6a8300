"""What a setting may be: its type, its range, whether it is a path. One line in each dataclass says so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dehvf_ds.config.errors import UserError


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``, either end left out where it is ``open``."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether the number lies inside; NaN and infinities never do."""
        if not math.isfinite(value) or not self.low <= value <= self.high:
            return False
        return not (self.open_low and value == self.low) and not (self.open_high and value == self.high)

    def __str__(self) -> str:
        """Ends the sentence ``it must be ...``."""
        low = f"{'above' if self.open_low else 'at least'} {_shown(self.low)}"
        return f"{low} and {'below' if self.open_high else 'at most'} {_shown(self.high)}"


_PATH = object()
# Far above any use and far below what overflows a counter or allocates a machine's memory by itself.
_MANY = 10**9

LocalPath = Annotated[str, _PATH]
"""A path, or a hub id or an address: ``~`` and ``$VAR`` in it are expanded."""

Positive = Annotated[int, Range(1, _MANY)]
AtLeastZero = Annotated[int, Range(0, _MANY)]
Rows = Annotated[int, Range(1, 2**20)]
Tokens = Annotated[int, Range(1, 2**20)]
Width = Annotated[int, Range(1, 2**16)]
Beams = Annotated[int, Range(1, 1024)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]
Minutes = Annotated[float, Range(0, 60 * 24 * 365, open_low=True)]
PositiveNumber = Annotated[float, Range(0, 10**6, open_low=True)]


@dataclass(frozen=True)
class Kind:
    """What a setting takes.

    Attributes:
        base: ``int``, ``float``, ``bool``, ``text``, ``path``, ``choice`` or ``list``.
        optional: None is a value too.
        range: of a number.
        choices: of a ``choice``.
        items: of a ``list``: kinds of its items, one for all where ``length`` is None.
        is_tuple: a ``list`` that is kept as a tuple.
        length: items of a ``list``; None takes any number.
    """

    base: Literal["int", "float", "bool", "text", "path", "choice", "list"]
    optional: bool = False
    range: Range | None = None
    choices: tuple[str, ...] = ()
    items: tuple[Kind, ...] = ()
    is_tuple: bool = False
    length: int | None = None


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration.

    Attributes:
        name: dotted, as in flags.
        kind: what it takes.
        required: it has no default.
        default: the value where none is given.
        help: of its docstring.
    """

    name: str
    kind: Kind
    required: bool
    default: Any
    help: str


@cache
def settings_of(config_class: type) -> Mapping[str, Setting]:
    """The settings of a configuration by dotted name, those of its sections included."""
    found = {}
    hints, told = _hints(config_class), _attributes(config_class)
    for field in fields(config_class):
        if is_dataclass(hints[field.name]):
            for setting in settings_of(hints[field.name]).values():
                name = f"{field.name}.{setting.name}"
                found[name] = Setting(name, setting.kind, setting.required, setting.default, setting.help)
            continue
        required = field.default is MISSING and field.default_factory is MISSING
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        kind = _kind_of(hints[field.name])
        found[field.name] = Setting(field.name, kind, required, default, told.get(field.name, ""))
    return found


def sections_of(config_class: type) -> Iterator[tuple[str, type]]:
    """The fields of a configuration that are configurations themselves, with their classes."""
    hints = _hints(config_class)
    for field in fields(config_class):
        if is_dataclass(hints[field.name]):
            yield field.name, hints[field.name]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Refuses numbers of another type or outside the range that their field's annotation states.

    Args:
        config: a dataclass; its sections check themselves.
        prefix: what the messages put before the names, as ``train.``.

    Raises:
        UserError: names the setting, its value and its range.
    """
    sections = {name for name, _ in sections_of(type(config))}
    settings = settings_of(type(config))
    for field in fields(config):
        if field.name not in sections:
            _check(settings[field.name].kind, getattr(config, field.name), prefix + field.name)


def _check(kind: Kind, value: Any, name: str) -> None:
    if value is None:
        if not kind.optional:
            raise UserError(f"{name} needs a value")
    elif kind.base == "list":
        if kind.length is not None and len(value) != kind.length:
            raise UserError(f"{name} has {len(value)} values, not {kind.length}")
        for number, item in enumerate(value):
            _check(kind.items[number if kind.length is not None else 0], item, name)
    elif kind.base in ("int", "float"):
        # Python takes True for 1.
        allowed = int if kind.base == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise UserError(f"{name} is {value!r}, not a {'whole ' * (kind.base == 'int')}number")
        assert kind.range is not None, f"{name} states no range"
        if value not in kind.range:
            raise UserError(f"{name} is {_shown(value)}; it must be {kind.range}")


def _kind_of(hint: Any) -> Kind:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return replace(_kind_of(inner), optional=True)
    if origin is Annotated:
        base, mark = arguments
        return Kind("path") if mark is _PATH else Kind(base.__name__, range=mark)
    if origin is Literal:
        return Kind("choice", choices=arguments)
    if origin in (tuple, list):
        any_number = origin is list or arguments[-1] is Ellipsis
        items = tuple(_kind_of(argument) for argument in arguments if argument is not Ellipsis)
        return Kind("list", items=items, is_tuple=origin is tuple, length=None if any_number else len(items))
    return Kind({bool: "bool", str: "text", int: "int", float: "float"}[hint])  # pyright: ignore[reportArgumentType]


@cache
def _hints(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class, include_extras=True)


def _attributes(config_class: type) -> dict[str, str]:
    """What the docstring's ``Attributes`` say, by name."""
    found: dict[str, str] = {}
    name = None
    section = (config_class.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
    for line in section.splitlines():
        text = line.strip()
        key, colon, rest = text.partition(": ")
        if colon and key in config_class.__annotations__ and len(line) - len(line.lstrip()) == 8:
            name, text = key, rest
            found[name] = ""
        if name is not None:
            found[name] = f"{found[name]} {text}".strip()
    return found


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
