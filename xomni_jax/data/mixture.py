"""A mixture: several named sources, of which each gives a fixed share of the examples.

Example i comes from a source, and is one of that source's own examples, by a table that repeats: both follow from i and the weights alone,
so that batches depend neither on the number of hosts nor on what was read before.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from xomni_jax.core.config import ConfigError, Natural, NonNegative, typed
from xomni_jax.data.sources import ENDLESS, DataSection, Example, Source, endless, fields_of

PERIOD = 10_000  # examples in which every source has its share exactly; shares are kept to a ten-thousandth
GOLDEN = 0x9E3779B97F4A7C15  # of 2**64: multiples of the golden ratio, without their whole part, are spread evenly over 0 to 1

Weight = NonNegative | tuple[tuple[Natural, NonNegative], ...]


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    `weight` relates to the sum of all weights; 0 switches the source off. It is a number, or (step, weight) pairs, between which it changes
    evenly; it stays as the first pair says before it, and as the last one says afterwards.
    """

    weight: Weight
    data: DataSection

    @property
    def pairs(self) -> tuple[tuple[int, float], ...]:
        """The weight as (step, weight) pairs."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)

    def at(self, steps: Any) -> Any:
        """The weight at each of the steps."""
        return np.interp(steps, *zip(*self.pairs, strict=True))


@dataclass(frozen=True)
class Parts:
    """The sources in the order of their names, as a section of a configuration."""

    by_name: Mapping[str, Part] = field(default_factory=dict)

    def updated(self, changes: Mapping[str, Any], where: str) -> Parts:
        """With other parts beside those there are, or with changed ones. A new part needs a source."""
        parts = dict(self.by_name)
        for name, values in changes.items():
            inner, old = f"{where}.{name}", parts.get(name)
            if not isinstance(values, Mapping) or not name.isidentifier() or old is None and not values.get("source"):
                raise ConfigError(f"{inner}: give a part a plain name and a section such as dict(source='files', weight=1.0, path='...')")
            values = dict(values)
            weight = typed(values.pop("weight", old.weight if old else 1.0), Weight, f"{inner}.weight", 1.0)
            if isinstance(weight, tuple) and (not weight or any(a >= b for (a, _), (b, _) in itertools.pairwise(weight))):
                raise ConfigError(f"{inner}.weight={weight}: the steps must increase, as in ((0, 1.0), (200, 0.2))")
            parts[name] = Part(weight, (old.data if old else DataSection("", None)).updated(values, inner))
        return Parts(dict(sorted(parts.items())))

    def as_dict(self) -> dict[str, Any]:
        """{name: source, weight and options}."""
        return {name: {"weight": part.weight} | part.data.as_dict() for name, part in self.by_name.items()}

    def defaults(self) -> dict[str, Any]:
        """{name: those of the options}."""
        return {name: part.data.defaults() for name, part in self.by_name.items()}

    def explained(self) -> dict[str, str]:
        """The names are free, so there is nothing to explain."""
        return {}


@dataclass(frozen=True)
class MixtureConfig:
    """Sources by name, with their shares.

    Attributes:
      parts: {name: dict(source=..., weight=..., and the options of the source)}; a weight relates to the sum of all, and may change with
        the step: weight=((0, 1.0), (200, 0.2))
      whole_batches: every batch comes from one part; parts whose images differ in size need it where a batch must have one size
    """

    parts: Parts = Parts()
    whole_batches: bool = False

    def __post_init__(self):
        for step in sorted({0, *(step for part in self.parts.by_name.values() for step, _ in part.pairs)}):
            weights = {name: float(part.at(step)) for name, part in self.parts.by_name.items()}
            if not sum(weights.values()):
                when = f" at step {step}" if step else ""
                raise ValueError(
                    f"the weights of the parts{when} ({weights or 'there are none'}) sum to 0; give one of them a positive weight"
                )
        nested = [name for name, part in self.parts.by_name.items() if part.data.names]
        if nested:
            raise ValueError(f"parts.{nested[0]} is a mixture itself; name its parts here, each with its weight")
        if self.changes:
            return
        low = [name for name, weight in weights.items() if 0 < weight and weight * PERIOD < sum(weights.values())]
        if low:
            raise ValueError(f"parts.{low[0]}.weight={weights[low[0]]:g} is below 1/{PERIOD} of the sum of all weights; raise it, or set 0")

    @property
    def changes(self) -> bool:
        """Whether a weight changes with the step."""
        return any(isinstance(part.weight, tuple) for part in self.parts.by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts that have a weight."""
        return tuple(name for name, part in self.parts.by_name.items() if any(weight for _, weight in part.pairs))

    @property
    def sections(self) -> tuple[DataSection, ...]:
        """The parts that have a weight."""
        return tuple(self.parts.by_name[name].data for name in self.names)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the images of all parts; the first is that of the first part."""
        return tuple(dict.fromkeys(size for part in self.sections for size in part.sizes))


class MixtureSource:
    """The mixture as a source. Its examples have `source`, the name of the part they come from, and `epoch`, how often that part's
    records had been read before (None where it is endless)."""

    Options: ClassVar[type] = MixtureConfig

    def __init__(self, options: MixtureConfig, seed: int, batch_size: int):
        self.names = options.names
        self.parts = parts = [options.parts.by_name[name] for name in self.names]
        self.batch_size, self.changes, self.unit = batch_size, options.changes, batch_size if options.whole_batches else 1
        # A part's seed depends on its name, so that other parts come and go without changing its order.
        seeds = [seed + zlib.crc32(name.encode()) for name in self.names]
        self.sources = [opened(*part, batch_size) for part in zip(self.names, parts, seeds, strict=True)]
        self.examples = [endless(source, own) for source, own in zip(self.sources, seeds, strict=True)]
        self.counts, self.part, self.number_in_part = interleaved([float(part.at(0)) for part in parts])
        self.num_records = [num_records(source) for source in self.sources]
        self.fields = frozenset.intersection(*(fields_of(source, "fields") for source in self.sources))
        self.offered = frozenset.union(*(fields_of(source, "offered") for source in self.sources))

    def __len__(self) -> int:
        return ENDLESS

    def place(self, index: int) -> tuple[int, int]:
        """(number of the part, index in it) of an example."""
        number, row = divmod(index, self.unit)
        if self.changes:  # the index in the part is that in the mixture: which other examples it had does not matter
            point = (number * GOLDEN % 2**64 >> 11) / 2**53
            return int(np.searchsorted(self._limits(index // self.batch_size), point, side="right")), index
        cycle, at = divmod(number, PERIOD)
        part = int(self.part[at])
        return part, (cycle * int(self.counts[part]) + int(self.number_in_part[at])) * self.unit + row

    def _limits(self, steps: Any) -> np.ndarray:
        """The share of every part together with those before it, at each of the steps."""
        weights = np.stack([part.at(steps) for part in self.parts], -1)
        limits = np.cumsum(weights, -1)
        return limits / limits[..., -1:]

    def shares(self, steps: int) -> np.ndarray:
        """The share of every part among the examples of so many steps."""
        if not self.changes:
            return self.counts / PERIOD
        return np.diff(self._limits(np.linspace(0, steps, min(steps, 10_000), endpoint=False)), axis=-1, prepend=0.0).mean(0)

    def __getitem__(self, index: int) -> Example:
        part, within = self.place(index)
        records = self.num_records[part]
        return {
            **self.examples[part][within],
            "source": self.names[part],
            "epoch": within / records if records and not self.changes else None,
        }


def opened(name: str, part: Part, seed: int, batch_size: int) -> Source:
    """The source of a part, whose complaints name the keys of the part."""
    try:
        return part.data.open(seed, batch_size)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.data.", f"config.data.parts.{name}.")) from error


def summary(data: DataSection, seed: int, batch_size: int, steps: int) -> list[str]:
    """What a run takes of every part of a mixture, a sentence each; nothing for any other source."""
    source = data.open(seed, batch_size) if data.names else None
    if not isinstance(source, MixtureSource):  # also where `first` repeats a few examples
        return []
    lines = []
    for name, share, records in zip(source.names, source.shares(steps), source.num_records, strict=True):
        taken, extent = steps * batch_size * share, f"from {records:,} records" if records else "endless"
        line = f"config.data.parts.{name}: {share:.2%} of the examples, {taken:,.0f} in {steps:,} steps, {extent}"
        if records and taken > records:
            line += f"; the source is shorter than the run, so every record comes about {taken / records:.3g} times"
        lines.append(line)
    return lines


def num_records(source: Source) -> int | None:
    """How many examples a source has before they repeat; None where it has no end."""
    return getattr(source, "num_records", None) or (len(source) if len(source) < ENDLESS else None)


def interleaved(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table of a mixture -> (examples of each part in a period, part of each example, number of each example within its part).

    The examples of a part are spread evenly over the period. Shares are rounded by the largest remainders, so that they sum to it.
    """
    exact = PERIOD * np.asarray(weights, float) / np.sum(weights)
    counts = np.floor(exact + 1e-6).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1
    order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in counts]), kind="stable")
    return counts, np.repeat(np.arange(len(counts)), counts)[order], np.concatenate([np.arange(n) for n in counts])[order]
