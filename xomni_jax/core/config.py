"""Configurations: dataclasses hold every default and its explanation; a file and the command line give only what differs.

A file's `get_config()` returns an `ml_collections.ConfigDict` of changes; `--config.KEY=VALUE` adds more. `updated` applies both to the
default instance of a stage's config class and checks each value against the type of its field.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import runpy
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from ml_collections import ConfigDict
from msgspec import Meta

from xomni_jax.core.shipped import CONFIGS, shipped

T = TypeVar("T")

# Numbers of a configuration, with their ranges: every number of a dataclass has one, or 1e30 would be found out in the middle of a run.
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Finite = Annotated[float, Meta(ge=-1e9, le=1e9)]
NonNegative = Annotated[float, Meta(ge=0, le=1e9)]
Positive = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]


class ConfigError(ValueError):
    """A configuration is wrong; the message names the key, the value and the remedy."""


class Text(str):
    """A value from the command line, to be read as the type of its field."""


class Changes(NamedTuple):
    """The values that a file and the command line set.

    Attributes:
      values: nested sections; values of the command line are `Text`.
      file, command: dotted keys set by the file, and by the command line.
    """

    values: dict[str, Any]
    file: frozenset[str] = frozenset()
    command: frozenset[str] = frozenset()


# ---- reading ----
def load_changes(path: str | Path, overrides: Sequence[str] = ()) -> Changes:
    """The changes of a file's `get_config()`, and those of `section.key=value` overrides, which take precedence.

    Raises:
      ConfigError: the file is missing, raises, or returns no ConfigDict; an override has no value.
    """
    path = Path(shipped(str(path)))
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; the shipped ones are under configs/")
    if path.suffix != ".py":
        raise ConfigError(f"{path}: is no Python file; a config file defines get_config(), as those under configs/ do")
    root = next((p for p in path.resolve().parents if p.name == "configs"), path.resolve().parent).parent
    before, sys.path = sys.path, [str(root), *sys.path, str(CONFIGS.parent)]
    try:
        defined = runpy.run_path(str(path))
        config = defined["get_config"]() if "get_config" in defined else None
    except (Exception, SystemExit) as e:  # noqa: BLE001 - the file is the user's code, which may raise anything
        raise ConfigError(f"{path}: {(str(e).strip().splitlines() or [type(e).__name__])[0]}") from e
    finally:
        sys.path = before
    if "get_config" not in defined:
        raise ConfigError(f"{path}: defines no get_config()")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    values = config.to_dict()
    file = frozenset(flat(values))
    command = merge_overrides(values, overrides)
    return Changes(values, file, command)


def merge_overrides(values: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Writes `section.key=value` overrides into nested sections and returns their dotted keys. ConfigError where one has no value."""
    keys = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no value; write --config.{key}=VALUE")
        *sections, last = key.split(".")
        node = values
        for name in sections:
            inner = node.get(name)
            node[name] = node = inner if isinstance(inner, dict) else {}
        node[last] = Text(text)
        keys.add(key)
    return frozenset(keys)


def read_overrides(arguments: Sequence[str]) -> list[str]:
    """`--config.key=value` arguments without their dashes."""
    return [argument.removeprefix("--config.") for argument in arguments]


# ---- applying ----
@typing.runtime_checkable
class Section(typing.Protocol):
    """A part of a configuration whose keys are not simply the fields of one dataclass, such as a preset with changes."""

    def updated(self, changes: Mapping[str, Any], where: str) -> Section:
        """A copy with some keys changed. ConfigError, naming `where`, for what does not fit."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Every key with its value."""
        ...

    def defaults(self) -> dict[str, Any]:
        """Every key with its default, as far as it has one."""
        ...

    def explained(self) -> dict[str, str]:
        """Every key with its explanation."""
        ...


def updated(default: T, changes: Mapping[str, Any], where: str = "config") -> T:
    """A copy of a (nested) frozen dataclass with some fields changed, each value checked against the type of its field.

    Raises:
      ConfigError: an unknown key (the nearest known ones are named), a value of another type, or one that the dataclass refuses.
    """
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{where} is a section; set one of its keys: {', '.join(sorted(as_dict(default)))}")
    if isinstance(default, Section):
        return default.updated(changes, where)
    if isinstance(default, Mapping):  # sections of one class under free names: a new name starts from the class's defaults
        new_section = type(next(iter(default.values())))
        new = {name: updated(default.get(name) or new_section(), value, f"{where}.{name}") for name, value in changes.items()}
        return dict(default) | new
    hints, new = field_types(type(default)), {}
    check_keys(changes, hints, where)
    for key, value in changes.items():
        old = getattr(default, key)
        new[key] = updated(old, value, f"{where}.{key}") if is_section(old) else typed(value, hints[key], f"{where}.{key}", old)
    return checked(lambda: dataclasses.replace(default, **new), where)


def check_known(config: Any, **known: Sequence[str]) -> None:
    """ValueError for a field whose value is none of its known ones: `check_known(self, schedule=SCHEDULES)`."""
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; use one of {', '.join(values)}")


def check_patterns(patterns: Sequence[str], names: Sequence[str], where: str, what: str = "parameter") -> None:
    """ConfigError for a regular expression that matches none of the names as a whole; it gives the nearest names."""
    for pattern in patterns:
        try:
            matches = any(re.fullmatch(pattern, name) for name in names)
        except re.error as e:
            raise ConfigError(f"{where}: {pattern!r} is no regular expression ({e}); write one such as '.*/(scale|bias)'") from None
        if not matches:
            near = ", ".join(difflib.get_close_matches(pattern, names, 3, 0.0))
            raise ConfigError(f"{where}: {pattern!r} matches no {what}; the nearest paths are {near}")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from plain values, such as those of a JSON file.

    Raises:
      ConfigError: an unknown key, a missing one, or a value that does not fit.
    """
    hints = field_types(cls)
    check_keys(values, hints, where)
    given = {
        key: updated(hints[key](), value, f"{where}.{key}") if _has_keys(hints[key]) else typed(value, hints[key], f"{where}.{key}")
        for key, value in values.items()
    }
    return checked(lambda: cls(**given), where)


def _has_keys(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def checked(make: Callable[[], T], where: str) -> T:
    """The dataclass that `make()` returns. Its own complaint about a value becomes a ConfigError that names the section."""
    try:
        return make()
    except ConfigError:
        raise
    except ZeroDivisionError:
        raise ConfigError(f"{where}: a size that others are divided by is 0; give a positive number") from None
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from None


def is_section(value: Any) -> bool:
    """Whether a field's value has keys of its own."""
    return isinstance(value, (Section, Mapping)) or dataclasses.is_dataclass(value)


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ConfigError for a key that a section does not have; it names the nearest known keys."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}.{key}: unknown key; {hint}")


# ---- types ----
OPTIONAL = re.compile(r"typing\.Optional\[(\w+)\]")
ANNOTATED = re.compile(r"typing\.Annotated\[(\w+)[^\]]*\]")


def field_types(cls: type) -> dict[str, Any]:
    """{field: annotated type} of the arguments of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def typed(value: Any, hint: Any, where: str, example: Any = None) -> Any:
    """A value as the annotated type `hint`. Lists become tuples, whole numbers floats; `Text` is read as a Python literal if that fits.

    Raises:
      ConfigError: naming the key, its value and what is expected.
    """
    if isinstance(value, Text):
        text = str(value)
        readings = [text, {"true": True, "false": False}.get(text.lower(), text)]
        with suppress(ValueError, SyntaxError):
            readings.insert(0, ast.literal_eval(text))
    else:
        readings = [value]
    problems = []
    for reading in readings:
        try:
            converted = msgspec.convert(reading, hint)
            return shipped(converted) if isinstance(converted, str) else converted
        except msgspec.ValidationError as e:
            problems.append(str(e).replace("`", "").removeprefix("Expected "))
    given = value if isinstance(value, Text) else repr(value)
    expected = problems[0]
    if ", got" in expected:  # of another type, rather than out of range
        expected = hint.__name__ if isinstance(hint, type) else OPTIONAL.sub(r"\1 | None", ANNOTATED.sub(r"\1", str(hint)))
    such = "" if example is None else f", such as {example!r}"
    raise ConfigError(f"{where}={given}: expected {expected}{such}")


# ---- showing and saving ----
def as_dict(config: Any) -> dict[str, Any]:
    """Every key of a configuration with its value, sections as nested dictionaries; JSON-able."""
    return {key: as_dict(value) if is_section(value) else value for key, value in entries(config).items()}


def entries(config: Any) -> dict[str, Any]:
    """Every key of one section with its value."""
    if isinstance(config, Section):
        return config.as_dict()
    if isinstance(config, Mapping):
        return dict(config)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def defaults(config: Any) -> dict[str, Any]:
    """Every key of a configuration with the default of its dataclass, as nested dictionaries; without keys that have none."""
    if isinstance(config, Mapping):
        return {name: defaults(section) for name, section in config.items() if is_section(section)}
    if isinstance(config, Section):
        return config.defaults()
    out = {}
    for f in dataclasses.fields(config):
        if is_section(value := getattr(config, f.name)):
            out[f.name] = defaults(value)
        elif f.default is not dataclasses.MISSING:
            out[f.name] = f.default
    return out


@functools.cache
def explanations(cls: type) -> dict[str, str]:
    """{field: sentence} of a dataclass, from the "Attributes:" part of its docstring and those of its base classes.

    An entry is `name: sentence` or `name, name: sentence`, on a line of its own, continued on more deeply indented lines.
    """
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=  \S)", listed.split("\n\n")[0]):
            names, colon, sentence = entry.strip().partition(": ")
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                out |= dict.fromkeys(names.split(", "), " ".join(sentence.split()))
    return out


def shown(config: Any, changes: Changes) -> str:
    """The resolved configuration as text, one key per line with its value, what set it, and its explanation."""
    legend = "# * set by the file, + set on the command line; everything else is the default"
    return "\n".join([legend, *_lines(config, changes, "", 0)])


def _lines(config: Any, changes: Changes, prefix: str, depth: int) -> Iterator[str]:
    own = isinstance(config, Section)
    sentences = config.explained() if own else {} if isinstance(config, Mapping) else explanations(type(config))
    for name, value in entries(config).items():
        key, indent, why = prefix + name, "  " * depth, f"  # {sentences[name]}" if sentences.get(name) else ""
        if is_section(value) and not own:
            yield f"  {indent}{name}:{why}"
            yield from _lines(value, changes, f"{key}.", depth + 1)
        else:
            mark = "+" if key in changes.command else "*" if key in changes.file else " "
            yield f"{mark} {indent}{name} = {value!r}{why}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {"section.key": value}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


# ---- settings that are known later ----
@dataclasses.dataclass(frozen=True)
class Overrides:
    """Changes to a dataclass whose own values are known only later, such as the settings that a model directory holds.

    Attributes:
      cls: the dataclass.
      values: the fields that are changed; every other field is None in the configuration and keeps the later value.
    """

    cls: type
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def updated(self, changes: Mapping[str, Any], where: str) -> Overrides:
        """More changes; None removes one."""
        hints = field_types(self.cls)
        check_keys(changes, hints, where)
        new = {key: typed(value, hints[key] | None, f"{where}.{key}") for key, value in changes.items()}
        return Overrides(self.cls, {key: value for key, value in {**self.values, **new}.items() if value is not None})

    def over(self, settings: T, where: str) -> T:
        """The settings with the changes applied."""
        return updated(settings, self.values, where)

    def as_dict(self) -> dict[str, Any]:
        """Every field; None where it is not changed."""
        return {name: self.values.get(name) for name in field_types(self.cls)}

    def defaults(self) -> dict[str, Any]:
        """None: not changed."""
        return dict.fromkeys(field_types(self.cls))

    def explained(self) -> dict[str, str]:
        """The explanations of the dataclass."""
        return explanations(self.cls)
