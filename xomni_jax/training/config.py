"""Run configurations: `get_config()` files at the edge, frozen dataclasses inside."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
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
      keep: how many resumable checkpoints stay on disk.
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
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name}={getattr(self, name)} must be at least 1")
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
    except (AttributeError, KeyError, SyntaxError, ImportError) as e:
        raise ConfigError(f"{path}: {str(e).splitlines()[0]}") from e
    finally:
        sys.path.remove(str(root))
    for override in overrides:
        apply_override(config, override)
    return config.lock()


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
    if not isinstance(node, ConfigDict) or last not in node:
        known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "nothing"
        raise ConfigError(f"config.{key}: unknown key; known here: {known}")
    default = node[last]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, bool) != isinstance(value, bool) and default is not None:
        value = {"true": True, "false": False}.get(text.lower(), value)
    if isinstance(default, str):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(default)(value)
    if default is not None and type(value) is not type(default):
        raise ConfigError(f"config.{key}={text}: expected {type(default).__name__}, such as {default!r}")
    node[last] = value


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

    try:
        return cls(**{name: frozen(value) for name, value in data.items()})
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from None
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


def run_config(config: ConfigDict) -> RunConfig:
    """The shared part of a configuration: its top-level plain keys."""
    return build(RunConfig, {k: v for k, v in config.items() if not isinstance(v, ConfigDict)}, "config")


def save_resolved(config: ConfigDict, run_dir: Path) -> None:
    """Writes RUN/config.json; refuses to go on in a run directory that was made with another configuration.

    `steps`, the logging intervals and the addresses of services may change between sessions of one run: they do not change what a step
    computes.
    """
    path, free = run_dir / "config.json", {"steps", "log_every", "save_every", "grid_every", "keep"}
    text = config.to_json_best_effort(indent=1, sort_keys=True)
    if path.is_file():
        old, new = without_urls(json.loads(path.read_text())), without_urls(json.loads(text))
        changed = sorted(k for k in set(old) | set(new) if k not in free and old.get(k) != new.get(k))
        if changed:
            raise ConfigError(
                f"{run_dir}: this run was started with another config.{changed[0]} "
                f"({old.get(changed[0])!r}, now {new.get(changed[0])!r}); use another run_dir or delete this one"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def without_urls(value: Any) -> Any:
    """A JSON value without its keys named "urls"."""
    return {k: without_urls(v) for k, v in value.items() if k != "urls"} if isinstance(value, dict) else value
