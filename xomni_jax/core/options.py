"""Command line flags from a dataclass: one per field, with its type, default and explanation."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection

from xomni_jax.core.config import explanations


def add_flags(parser: argparse._ActionsContainer, cls: type, without: Collection[str] = ()) -> None:
    """Adds `--field-name` for every field of a dataclass but some: str, int, float, bool, Literal, or one of these or None."""
    hints, sentences = typing.get_type_hints(cls), explanations(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in without):
        kind, help = hints[field.name], sentences.get(field.name, "").rstrip(".")
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        if field.default is dataclasses.MISSING:
            how = {"required": True}
        else:
            how = {"default": field.default}
            help += "" if field.default in (None, "") else f" (default {field.default})"
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            how["choices"] = typing.get_args(kind)
        else:
            how |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), help=help.strip().replace("%", "%%"), **how)
