"""Benchmarks whose prompts must not be trained on: the suites that `config.data.exclude` names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from xomni_jax.core.config import ConfigError
from xomni_jax.data.files import Benchmark, FilesConfig
from xomni_jax.data.mixture import MixtureConfig, Parts
from xomni_jax.data.sources import DataSection
from xomni_jax.evaluation.suites import get_suite


def with_benchmarks(data: DataSection) -> DataSection:
    """The data with the prompts of every suite that `exclude` names as SUITE=FOLDER, in the parts of a mixture as well.

    Raises:
      ConfigError: there is no such suite, or its folder does not hold what the suite needs.
    """
    options = data.options
    if isinstance(options, MixtureConfig):
        parts = {name: dataclasses.replace(part, data=with_benchmarks(part.data)) for name, part in options.parts.by_name.items()}
        options = dataclasses.replace(options, parts=Parts(parts))
    elif isinstance(options, FilesConfig):
        options = dataclasses.replace(options, exclude=tuple(map(_entry, options.exclude)))
    return dataclasses.replace(data, options=options)


def _entry(entry: str) -> str:
    suite, equals, folder = entry.partition("=")
    if not equals or Path(entry).exists():
        return entry
    found = Benchmark(entry)
    try:
        found.prompts = {item.prompt: f"{suite}, item {item.id}" for item in get_suite(suite).load(Path(folder))}
    except ValueError as error:
        raise ConfigError(f"config.data.exclude: {error}") from error
    return found
