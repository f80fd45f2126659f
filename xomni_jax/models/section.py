"""The part of a configuration that describes one component: a preset, and the fields in which it differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from xomni_jax.core.config import ConfigError, Text, check_keys, checked, explanations, field_types, typed

STORED = "stored"  # the preset of a component as the model directory holds it

# How a stored model is computed, which a run may choose; every other field says what the model is.
COMPUTATION = (
    "dtype", "param_dtype", "int8", "remat", "attention", "attention_chunk", "query_chunk", "microbatch", "chunk", "unroll",
    "order",  # a model of one order goes on learning in another: the parameters are the same
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """A preset and the fields that replace its own.

    Attributes:
      presets: named configs of the component, all of one class.
      preset: a name among them, or "stored".
      fields: {field of the config: value}.
    """

    presets: Mapping[str, Any]
    preset: str = STORED
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cls(self) -> type:
        """The config class."""
        return type(next(iter(self.presets.values())))

    def updated(self, changes: Mapping[str, Any], where: str) -> ModelSection:
        """With another preset, or more fields replaced. ConfigError for what the config class does not have or take."""
        hints = field_types(self.cls)
        check_keys(changes, ["preset", *hints], where)
        preset, fields = self.preset, dict(self.fields)
        for key, value in changes.items():
            if key == "preset":
                preset = str(value)
            else:
                fields[key] = (
                    number_format(value, f"{where}.{key}") if key.endswith("dtype") else typed(value, hints[key], f"{where}.{key}")
                )
        if preset not in (STORED, *self.presets):
            raise ConfigError(f"{where}.preset={preset!r} is unknown; use one of {', '.join(self.presets)}")
        section = ModelSection(self.presets, preset, fields)
        if preset != STORED:
            section.config(where=where)  # the class may refuse a combination
        return section

    def config(self, stored: Any = None, where: str = "config") -> Any:
        """The component's config; `stored` is that of the model directory, which the preset "stored" starts from."""
        base = stored if self.preset == STORED else self.presets[self.preset]
        return checked(lambda: dataclasses.replace(base, **self.fields), where)

    def as_dict(self) -> dict[str, Any]:
        """The preset and every field that is known without the model directory."""
        if self.preset == STORED:
            fields = dict(self.fields)
        else:
            config = self.config()
            fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
        return {"preset": self.preset} | {k: jnp.dtype(v).name if k.endswith("dtype") else v for k, v in fields.items()}

    def defaults(self) -> dict[str, Any]:
        """Those of the config class."""
        return {f.name: f.default for f in dataclasses.fields(self.cls) if f.default is not dataclasses.MISSING}

    def explained(self) -> dict[str, str]:
        """The explanations of the config class."""
        choice = f"one of {', '.join(self.presets)}, or stored: as the model directory holds it"
        return {"preset": choice} | explanations(self.cls)


def number_format(value: Any, where: str) -> Any:
    """A dtype by its name. ConfigError where there is none such."""
    try:
        return jnp.dtype(str(value) if isinstance(value, (str, Text)) else value)
    except TypeError:
        raise ConfigError(f"{where}={str(value)!r} is no number format; use float32 or bfloat16") from None
