"""Every number of every training configuration, set to what it cannot be: one sentence, before anything is read."""

import dataclasses
import typing

import pytest

from xomni_jax.core.config import Changes, ConfigError, Text, as_dict, field_types, flat
from xomni_jax.training.stage import STAGES, resolve

TRAINING = ("tokenizer", "pretrain", "sft", "decoder", "grpo")
ODD = ("-1", "0", "0.0", "-1e-9", "1.5", "1e30", "1" + 30 * "0", "1e999", "nan", "none", "''")


def numbers(config):
    """Dotted keys of the numbers, those of lists and of names left out."""
    return [key for key, value in flat(as_dict(config)).items() if isinstance(value, (int, float)) and not isinstance(value, bool)]


@pytest.mark.parametrize("stage", TRAINING)
def test_what_no_number_can_be(stage):
    """A value is taken or refused in one sentence that names its section; what no number takes is refused."""
    keys = numbers(STAGES.get(stage).Config())
    assert {"steps", "seed", "optimizer.b1", "mesh.fsdp"} <= set(keys)
    for key in keys:
        for text in ODD:
            *sections, last = key.split(".")
            values = {last: Text(text)}
            for section in reversed(sections):
                values = {section: values}
            try:
                resolve(Changes({"stage": stage, **values}))
                told = ""
            except ConfigError as e:
                told = str(e)
                assert told.startswith(f"config.{key.rpartition('.')[0]}".rstrip(".")) and "\n" not in told, (key, text, told)
            assert told or text not in ("nan", "none", "''"), (key, text)


def dataclasses_of(cls):
    """A configuration's class and those of its sections, as far as they belong to training."""
    yield cls
    default = cls()
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        values = value.values() if isinstance(value, dict) else (value,)
        for one in values:
            if type(one).__module__.startswith(("xomni_jax.training.", "xomni_jax.rl.", "xomni_jax.sharding.")):
                yield from dataclasses_of(type(one))


def unbounded(hint):
    """Whether an annotated type has a number without a range in it."""
    if typing.get_origin(hint) is typing.Annotated:
        return False
    return hint in (int, float) or any(map(unbounded, typing.get_args(hint)))


@pytest.mark.parametrize("stage", TRAINING)
def test_every_number_has_a_range(stage):
    """So that a new field cannot be forgotten."""
    found = {
        f"{cls.__name__}.{name}"
        for cls in dataclasses_of(STAGES.get(stage).Config)
        for name, hint in field_types(cls).items()
        if unbounded(hint)
    }
    assert found == set()
