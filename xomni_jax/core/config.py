"""Configurations: dataclasses hold every default and its explanation, a file and the command line name what differs from them.

A file's `get_config()` returns an `ml_collections.ConfigDict` with the changes alone; `--config.KEY=VALUE` adds more. `updated` applies both
to the default instance of a stage's config class, checked by the types of its fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration is wrong; the message names the key, the value and the remedy."""


class Text(str):
    """A value from the command line, to be read as the type of its field."""


class Changes(NamedTuple):
    """What a file and the command line change.

    Attributes:
      values: nested sections; values of the command line are `Text`.
      file, command: dotted keys that each of the two sets.
    """

    values: dict[str, Any]
    file: frozenset[str] = frozenset()
    command: frozenset[str] = frozenset()


# ---- reading ----
def load_changes(path: str | Path, overrides: Sequence[str] = ()) -> Changes:
    """The changes of a file's `get_config()`, and of `section.key=value` overrides over them.

    Raises:
      ConfigError: the file is missing, raises, or returns no ConfigDict; an override has no value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; the shipped ones are under configs/")
    root = next((p for p in path.resolve().parents if p.name == "configs"), path.resolve().parent).parent
    sys.path.insert(0, str(root))
    try:
        spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: defines no get_config()")
        config = module.get_config()
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    except ConfigError:
        raise
    except Exception as e:  # noqa: BLE001 - the file is the user's code: whatever it raises is theirs to mend
        raise ConfigError(f"{path}: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}") from e
    finally:
        sys.path.remove(str(root))
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
    """`--config.key=value` arguments without their dashes. ConfigError for any other argument."""
    for argument in arguments:
        if not argument.startswith("--config."):
            raise ConfigError(f"unknown argument {argument!r}; overrides are written --config.KEY=VALUE")
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

    def explained(self) -> dict[str, str]:
        """Every key with its explanation."""
        ...


def updated(default: T, changes: Mapping[str, Any], where: str = "config") -> T:
    """A copy of a (nested) frozen dataclass with some fields changed, each value checked by the type of its field.

    Raises:
      ConfigError: an unknown key (the nearest known ones are named), a value of another type, or one that the dataclass refuses.
    """
    if isinstance(default, Section):
        return default.updated(changes, where)
    if isinstance(default, Mapping):
        return _updated_mapping(default, changes, where)
    hints = typing.get_type_hints(type(default))
    fields = [f.name for f in dataclasses.fields(default) if f.init]
    new = {}
    for key, value in changes.items():
        if key not in fields:
            raise ConfigError(unknown_key(where, key, fields))
        old = getattr(default, key)
        if not is_section(old):
            new[key] = typed(value, hints[key], f"{where}.{key}", old)
        elif isinstance(value, Mapping):
            new[key] = updated(old, value, f"{where}.{key}")
        else:
            raise ConfigError(f"{where}.{key} is a section; set one of its keys: {', '.join(sorted(as_dict(old)))}")
    return checked(lambda: dataclasses.replace(default, **new), where)


def checked(make: Any, where: str) -> Any:
    """What `make()` returns; a value that a dataclass refuses becomes a ConfigError that says where it stands."""
    try:
        return make()
    except ConfigError:
        raise
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{where}: {e}") from None


def _updated_mapping(default: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Sections of one class under free names: a new name starts from the class's defaults."""
    new, kind = dict(default), type(next(iter(default.values())))
    for name, value in changes.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}.{name} is a section; set one of its keys: {', '.join(f.name for f in dataclasses.fields(kind))}")
        new[name] = updated(default[name] if name in default else kind(), value, f"{where}.{name}")
    return new


def is_section(value: Any) -> bool:
    """Whether a field's value has keys of its own."""
    return isinstance(value, (Section, Mapping)) or dataclasses.is_dataclass(value) and not isinstance(value, type)


def unknown_key(where: str, key: str, known: Sequence[str]) -> str:
    """The message for a key that a section does not have."""
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{where}.{key}: unknown key; {hint}"


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from plain values, such as those of a JSON file.

    Raises:
      ConfigError: an unknown key, a missing one, or a value that does not fit.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_key(where, key, fields))
    given = {key: typed(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    return checked(lambda: cls(**given), where)


# ---- types ----
def typed(value: Any, hint: Any, where: str, example: Any = None) -> Any:
    """A value as an annotated type wants it: lists become tuples, and `Text` is read as a literal, or taken as it is for a string.

    Raises:
      ConfigError: naming the key, its value and what is expected.
    """
    if isinstance(value, Text):
        given, value = str(value), literal(value)
        if not fits(value, hint):
            value = {"true": True, "false": False}.get(given.lower(), given)
    else:
        given = repr(value)
    value = frozen(value)
    if not fits(value, hint):
        expected = hint.__name__ if isinstance(hint, type) else str(hint)
        such = "" if example is None else f", such as {example!r}"
        raise ConfigError(f"{where}={given}: expected {expected}{such}")
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and hint in (float, float | None) else value


def literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return str(text)


def frozen(value: Any) -> Any:
    """Lists become tuples, at every depth."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers fit `float`, lists fit tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, h) for h in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple or hint is tuple:
        if not isinstance(value, (list, tuple)) or not inner:
            return isinstance(value, (list, tuple))
        inner = inner[:1] * len(value) if inner[1:] in ((), (...,)) else inner
        return len(inner) == len(value) and all(map(fits, value, inner))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


# ---- showing and saving ----
def as_dict(config: Any) -> dict[str, Any]:
    """Every key of a configuration with its value, sections as nested dictionaries; JSON-able."""
    if isinstance(config, Section):
        return config.as_dict()
    items = (
        config.items() if isinstance(config, Mapping) else ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config) if f.init)
    )
    return {name: as_dict(value) if is_section(value) else value for name, value in items}


@functools.cache
def explanations(cls: type) -> dict[str, str]:
    """{field: sentence} of a dataclass, from the "Attributes:" part of its docstring and those of its base classes.

    An entry is `name: sentence` or `name, name: sentence`, on a line of its own, continued on more deeply indented lines.
    """
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, entries = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=  \S)", entries.split("\n\n")[0]):
            names, colon, sentence = entry.strip().partition(": ")
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                out |= dict.fromkeys(names.split(", "), " ".join(sentence.split()))
    return out


def shown(config: Any, changes: Changes) -> str:
    """The resolved configuration as text: a line a key, with where its value comes from and what it means."""
    legend = "# * set by the file, + set on the command line; everything else is the default"
    return "\n".join([legend, *_lines(config, changes, "", 0)])


def _lines(config: Any, changes: Changes, prefix: str, depth: int) -> Iterator[str]:
    own = isinstance(config, Section)
    said = config.explained() if own else {} if isinstance(config, Mapping) else explanations(type(config))
    inner = config.as_dict() if own else config if isinstance(config, Mapping) else vars(config)
    for name, value in inner.items():
        key, indent, why = prefix + name, "  " * depth, f"  # {said[name]}" if said.get(name) else ""
        if is_section(value) and not own:
            yield f"  {indent}{name}:{why}"
            yield from _lines(value, changes, f"{key}.", depth + 1)
        else:
            mark = "+" if key in changes.command else "*" if key in changes.file else " "
            yield f"{mark} {indent}{name} = {value!r}{why}"


def save_resolved(config: Any, run_dir: Path, write: bool = True) -> None:
    """Writes RUN/config.json; refuses to go on in a run directory that was made with another configuration.

    Logging intervals and the addresses of services may change between sessions of one run, they do not change what a step computes;
    and `steps` may, to train on: schedules then follow the new length. Without `write` it only compares: one process of a run writes.
    """
    path = run_dir / "config.json"
    text = json.dumps(as_dict(config), indent=1, sort_keys=True, default=str)
    if path.is_file():
        old, new = flat(json.loads(path.read_text())), flat(json.loads(text))
        changed = sorted(k for k in set(old) | set(new) if not may_change(k) and old.get(k) != new.get(k))
        if changed:
            raise ConfigError(
                f"{run_dir}: this run was started with config.{changed[0]}={old.get(changed[0])!r}, now it is "
                f"{new.get(changed[0])!r}; use another run_dir or delete this one"
            )
    if not write:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    part = path.with_name("config.json.part")
    part.write_text(text + "\n")
    os.replace(part, path)


def may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of this key."""
    return key in ("steps", "log_every", "save_every", "save_minutes", "grid_every", "keep", "keep_every") or key.endswith(".urls")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {"section.key": value}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


# ---- sections of their own kind ----
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
        """More changes; None takes one back."""
        hints, fields = typing.get_type_hints(self.cls), [f.name for f in dataclasses.fields(self.cls)]
        new = dict(self.values)
        for key, value in changes.items():
            if key not in fields:
                raise ConfigError(unknown_key(where, key, fields))
            value = typed(value, hints[key] | None, f"{where}.{key}")
            new = {k: v for k, v in new.items() if k != key} | ({} if value is None else {key: value})
        return Overrides(self.cls, new)

    def over(self, settings: T, where: str) -> T:
        """The settings with the changes applied."""
        return updated(settings, self.values, where)

    def as_dict(self) -> dict[str, Any]:
        """Every field; None where it is not changed."""
        return {f.name: self.values.get(f.name) for f in dataclasses.fields(self.cls)}

    def explained(self) -> dict[str, str]:
        """The explanations of the dataclass."""
        return explanations(self.cls)
