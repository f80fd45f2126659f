"""Run configurations: `get_config()` files at the edge, frozen dataclasses inside."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration is wrong; the message names the key, the value and the mend."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training stage shares.

    Attributes:
      stage: tokenizer | pretrain | sft | decoder | grpo.
      run_dir: where the resolved config, metrics, image grids, checkpoints and the final model go.
      init_from: model directory that supplies the frozen and the starting parameters; "" starts from random ones.
      seed: all randomness of a run derives from it, the step and the purpose.
      steps: optimizer updates (for grpo: rollout batches).
      batch_size: examples per step over all devices (for grpo: prompts per step).
      log_every, save_every, grid_every: in steps; 0 turns grids off.
      save_minutes: a checkpoint also after so many minutes, at the next logged step; 0: by steps alone.
      keep, keep_every: the newest `keep` resumable checkpoints stay on disk, and those of steps that `keep_every` divides; 0: no others.
    """

    stage: str
    run_dir: str
    init_from: str = ""
    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    log_every: int = 10
    save_every: int = 200
    grid_every: int = 200
    save_minutes: float = 0.0
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name}={getattr(self, name)} must be at least 1")
        for name in ("save_minutes", "keep_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"config.{name}={getattr(self, name)} must not be negative; 0 turns it off")
        if not self.run_dir:
            raise ConfigError("config.run_dir is empty; name a folder for the run's output")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Executes `get_config()` of a config file and applies `section.key=value` overrides, strictly.

    Raises:
      ConfigError: the file is missing or has no get_config; a key is unknown or a value has another type than its default.
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
    for override in overrides:
        apply_override(config, override)
    return config.lock()


def read_overrides(arguments: Sequence[str]) -> list[str]:
    """`--config.key=value` arguments without their dashes. ConfigError for any other argument."""
    for argument in arguments:
        if not argument.startswith("--config."):
            raise ConfigError(f"unknown argument {argument!r}; overrides are written --config.KEY=VALUE")
    return [argument.removeprefix("--config.") for argument in arguments]


def apply_override(config: ConfigDict, override: str) -> None:
    """Sets one `section.key=value`; the value is a Python literal, or a bare string where the default is one."""
    key, eq, text = override.partition("=")
    if not eq:
        raise ConfigError(f"override {override!r} has no value; write --config.{key}=VALUE")
    *sections, last = key.split(".")
    node = config
    for name in sections:
        if not isinstance(node, ConfigDict) or name not in node:
            raise ConfigError(f"config.{key}: no section {name!r}; known here: {', '.join(sorted(node))}")
        node = node[name]
    if isinstance(node, ConfigDict) and "preset" in node and last not in node:
        node[last] = literal(text)  # a field of the preset; `from_preset` knows them and their types
        return
    if not isinstance(node, ConfigDict) or last not in node:
        known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "nothing"
        raise ConfigError(f"config.{key}: unknown key; known here: {known}")
    default = node[last]
    if isinstance(default, ConfigDict):
        raise ConfigError(f"config.{key} is a section; set one of its keys: {', '.join(sorted(default))}")
    value = literal(text)
    if isinstance(default, bool) and not isinstance(value, bool):
        value = {"true": True, "false": False}.get(text.lower(), value)
    if isinstance(default, str):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(default)(value)
    # None turns an optional number off; where a number is needed, the section's dataclass refuses it.
    if default is not None and value is not None and type(value) is not type(default):
        raise ConfigError(f"config.{key}={text}: expected {type(default).__name__}, such as {default!r}")
    node[last] = value


def literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(cls: type[T], section: Any, where: str) -> T:
    """A frozen dataclass from a config section; nested dataclass fields are built from nested sections.

    Raises:
      ConfigError: an unknown key, a missing one, or a value the dataclass refuses.
    """
    data = dict(section.items()) if isinstance(section, ConfigDict) else dict(section)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}: unknown key; {cls.__name__} has {', '.join(sorted(fields))}")

    def frozen(value):
        return tuple(frozen(v) for v in value) if isinstance(value, (list, tuple)) else value

    check_types(cls, data, where)
    try:
        return cls(**{name: frozen(value) for name, value in data.items()})
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from None
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


def check_types(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Refuses values that do not fit the annotations of a dataclass; whole numbers fit `float`, lists fit tuples.

    Raises:
      ConfigError: naming the key, its value and what was expected.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not fits(value, hints[name]):
            expected = hints[name].__name__ if isinstance(hints[name], type) else str(hints[name])
            raise ConfigError(f"{where}.{name}={value!r}: expected {expected}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a configuration value is of an annotated type."""
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
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def check_sections(config: ConfigDict, sections: Sequence[str], stage: str) -> None:
    """Refuses a configuration that lacks a section its stage reads, or holds one that it does not.

    Raises:
      ConfigError: naming the first such section.
    """
    have = {key for key, value in config.items() if isinstance(value, ConfigDict)}
    missing, extra = sorted(set(sections) - have), sorted(have - set(sections))
    if missing:
        raise ConfigError(f"config.{missing[0]}: stage {stage} needs this section; start from configs.base.{stage}()")
    if extra:
        raise ConfigError(f"config.{extra[0]}: stage {stage} reads no such section; it reads {', '.join(sorted(sections))}")


def run_config(config: ConfigDict) -> RunConfig:
    """The shared part of a configuration: its top-level plain keys.

    Raises:
      ConfigError: a key is unknown, or the configuration is one of inference.
    """
    if config.get("stage") == "inference":
        raise ConfigError("config.stage='inference' trains nothing; give this file to xomni generate, chat, eval or plan")
    return build(RunConfig, {k: v for k, v in config.items() if not isinstance(v, ConfigDict)}, "config")


def save_resolved(config: ConfigDict, run_dir: Path, write: bool = True) -> None:
    """Writes RUN/config.json; refuses to go on in a run directory that was made with another configuration.

    Logging intervals and the addresses of services may change between sessions of one run, they do not change what a step computes;
    and `steps` may, to train on: schedules then follow the new length. Without `write` it only compares: one process of a run writes.
    """
    path = run_dir / "config.json"
    text = config.to_json_best_effort(indent=1, sort_keys=True)
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
