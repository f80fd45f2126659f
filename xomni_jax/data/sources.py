"""Where training examples come from: named sources with random access, and their batches as grain data.

An example is a dict. Every stage reads `image` (uint8 [H, W, 3]), `caption` and `id`; understanding reads `question` and `answer`, rewards
read `targets`, and the tokenizer's dense task reads `columns` (int32 [Y, X], a label per token). In place of `image` an example may have
`codes` (integers [Y, X]), which `xomni data tokenize` has made of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from xomni_jax.core.config import ConfigError, Natural, Text, as_dict, build, checked, defaults, explanations, field_types, typed, updated
from xomni_jax.core.registry import Registry

if TYPE_CHECKING:
    import grain

_WINDOW = 8  # blocks
ENDLESS = 2**40  # examples of a source without an end; grain counts with 64-bit integers

Example = dict[str, Any]


class Source(Protocol):
    """Examples by index. Examples n * batch_size to (n + 1) * batch_size - 1 make up batch n and have images of one size.

    A source may also have `fields`, the names of what all of its examples hold, `offered`, of what any of them holds, and `num_records`,
    how many there are before they repeat; otherwise its first example and its length say so.

    Attributes:
      Options: frozen dataclass of what can be configured, with a field `sizes`: the (height, width) in pixels that images may have.
    """

    Options: ClassVar[type]

    def __init__(self, options: Any, seed: int, batch_size: int): ...

    def __len__(self) -> int:
        """Number of examples; `ENDLESS` where they are made up. Those of a finite source are shuffled in every epoch."""
        ...

    def __getitem__(self, index: int) -> Example: ...


class Examples(Protocol):
    """Examples by number. One that cannot be used raises ValueError, with place and reason, when it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Example: ...


class ShuffledSource(Source, Protocol):
    """A source that shuffles its records itself, so that its examples have no end, and can also give every record once."""

    @classmethod
    def epoch(cls, options: Any) -> Examples:
        """Every record at its number, in the order of the files."""
        ...


SOURCES = Registry(
    "source",
    {
        "rendered": "xomni_jax.data.rendered:RenderedSource",
        "rehearsal": "xomni_jax.data.rendered:RehearsalSource",
        "edits": "xomni_jax.data.edits:EditsSource",
        "files": "xomni_jax.data.files:FilesSource",
        "prompts": "xomni_jax.data.files:PromptsSource",
        "codes": "xomni_jax.data.codes:CodesSource",
        "mixture": "xomni_jax.data.mixture:MixtureSource",
        "judged": "xomni_jax.data.judged_signs:JudgedSource",
    },
)


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The part of a configuration that names a source and its options.

    Attributes:
      source: a name in `SOURCES`, or path/to/file.py:Class.
      options: an instance of the source's `Options`.
      first: only so many examples, again and again in their order; 0: all.
    """

    source: str
    options: Any
    first: int = 0

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of the images; the first is the main one."""
        return self.options.sizes

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that made the codes which the examples hold; empty where they hold images."""
        return getattr(self.options, "tokenizer", "")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts of a mixture; none for any other source."""
        return getattr(self.options, "names", ())

    @property
    def parts(self) -> tuple[DataSection, ...]:
        """The parts of a mixture; any other source is alone."""
        return getattr(self.options, "sections", (self,))

    def open(self, seed: int, batch_size: int) -> Source:
        """The source itself, its batches of `batch_size` examples."""
        source = SOURCES.get(self.source)(self.options, seed, batch_size)
        return Repeated(source, self.first, batch_size) if self.first else source

    def epoch(self, seed: int = 0) -> Examples:
        """Every record of the source once, in its order; `ENDLESS` examples where they are made up, from `seed`.

        Raises:
          ConfigError: there is no record.
        """
        cls = SOURCES.get(self.source)
        records = cls.epoch(self.options) if hasattr(cls, "epoch") else cls(self.options, seed, 1)
        if not len(records):
            raise ConfigError(f"config.data.source={self.source}: holds no records; name files that hold some")
        return records

    def updated(self, changes: Mapping[str, Any], where: str) -> DataSection:
        """With another source, which starts from its own defaults, or with other options."""
        changes = dict(changes)
        named = changes.pop("source", self.source)
        first = typed(changes.pop("first", self.first), Natural, f"{where}.first")
        source, options = str(named), self.options
        if source == self.source:
            return DataSection(source, updated(options, changes, where), first)
        kind = getattr(checked(lambda: SOURCES.get(source), f"{where}.source"), "Options", None)
        if kind is None or not ("sizes" in field_types(kind) or hasattr(kind, "sizes")):
            raise ConfigError(f"{where}.source={source}: is no source: it has no Options with `sizes`, the (height, width) of its images")
        if isinstance(named, Text):  # on the command line: options in the file that are those of another source do not count
            changes = {key: value for key, value in changes.items() if key in field_types(kind) or isinstance(value, Text)}
        return DataSection(source, build(kind, changes, where), first)

    def as_dict(self) -> dict[str, Any]:
        """The source's name and its options."""
        return {"source": self.source} | as_dict(self.options) | ({"first": self.first} if self.first else {})

    def defaults(self) -> dict[str, Any]:
        """Those of the options."""
        return defaults(self.options)

    def explained(self) -> dict[str, str]:
        """The explanations of the options."""
        names = f"one of {', '.join(SOURCES.names())}, or a class of your own as path/to/file.py:Class"
        return {"source": names, "first": "only so many examples, again and again; 0: all"} | explanations(type(self.options))


class Repeated:
    """The first examples of a source, again and again, in batches of one size. The last of them fill up a batch of their own."""

    def __init__(self, source: Source, count: int, batch_size: int):
        self.source, self.count, self.batch_size = source, min(count, len(source)), batch_size

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, self.batch_size)
        start = batch % -(-self.count // self.batch_size) * self.batch_size
        return self.source[start + row % min(self.batch_size, self.count - start)]


class BatchOrder:
    """The order of records that have images of several sizes: shuffled anew in every epoch, every batch of one size.

    An epoch holds as many whole batches of every size as there are records for; at least one, for which records are repeated. Records of
    different weights are drawn with replacement, by weight.

    Args:
      members: {(height, width): numbers of the records of that size}.
      weights: of these records, in the same order; None where all weigh the same.
      blocks: for the number of every record that of those that are read together with it, -1 where it is read alone. Records are then
        shuffled in windows of a few blocks, which are in memory together.
    """

    def __init__(
        self,
        members: Mapping[tuple[int, int], Sequence[int]],
        seed: int,
        batch_size: int,
        weights: Mapping[tuple[int, int], np.ndarray] | None = None,
        blocks: np.ndarray | None = None,
    ):
        self.members, self.seed, self.batch_size, self.weights, self.blocks = members, seed, batch_size, weights, blocks
        expected = {size: float(len(numbers)) for size, numbers in members.items()}
        if weights is not None:
            unit = sum(expected.values()) / sum(weight.sum() for weight in weights.values())
            expected = {size: unit * weight.sum() for size, weight in weights.items()}
        # The size of every batch of an epoch, before they are shuffled, and the number of its earlier batches of that size.
        self._counts = {size: max(1, int(records / batch_size + 1e-9)) for size, records in expected.items()}
        self._plan = [(size, n) for size, count in self._counts.items() for n in range(count)]
        self._order = functools.lru_cache(2 * len(members) + 2)(self._permutation)

    def __getitem__(self, index: int) -> tuple[int, tuple[int, int]]:
        """(number of the record, size of its image) of an example."""
        batch, row = divmod(index, self.batch_size)
        epoch, slot = divmod(batch, len(self._plan))
        size, earlier = self._plan[self._order(epoch, None)[slot]]
        return int(self._order(epoch, size)[earlier * self.batch_size + row]), size

    def _permutation(self, epoch: int, size: tuple[int, int] | None) -> np.ndarray:
        """Of the records of one size, or of the epoch's batches where the size is None."""
        rng = np.random.default_rng([self.seed, epoch, *(size or ())])
        if size is None:
            order = rng.permutation(len(self._plan))
            if self.blocks is None:
                return order
            sizes = np.repeat(np.arange(len(self._counts)), list(self._counts.values()))[order]
            return np.argsort(sizes, kind="stable").argsort()  # batches of a size in their order, as its windows are
        numbers, needed = np.asarray(self.members[size]), self._counts[size] * self.batch_size
        if self.weights is not None:
            drawn = rng.choice(numbers, needed, p=self.weights[size] / self.weights[size].sum())
        else:
            drawn = rng.permutation(np.resize(numbers, max(len(numbers), needed)))
        return drawn if self.blocks is None else drawn[np.argsort(self._windows(epoch)[drawn], kind="stable")]

    def _windows(self, epoch: int) -> np.ndarray:
        """The window of every record in an epoch: that of its block, equal for all sizes, or any for a record without one."""
        rng, blocks = np.random.default_rng([self.seed, epoch]), int(self.blocks.max()) + 1
        of_block = rng.permutation(blocks) // _WINDOW
        return np.where(self.blocks < 0, rng.integers(0, of_block.max() + 1, len(self.blocks)), of_block[self.blocks])


def batches(
    data: DataSection,
    seed: int,
    batch_size: int,
    *,
    rows: Sequence[int] | None = None,
    count: int | None = None,
    transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    prefetch: int = 2,
    fields: Sequence[str] = (),
    mixed: bool = False,
) -> grain.IterDataset:
    """Batches of a source as a grain IterDataset, endless unless `count` says how many.

    `batch_size` counts examples over all hosts; `rows` are those of every batch that this host loads (None: all), so that batches do
    not depend on the number of hosts, nor does an iterator's state: it counts batches. `transform` maps a collated batch (see `collate`),
    whose ids stay.
    `fields` are those that the caller reads of every example; `a|b` means either. `mixed`: the caller takes examples that lack some of
    them, or images, and images of several sizes in one batch. ConfigError when the source does not give what is needed.
    One thread loads `prefetch` batches ahead; 0 loads in the caller's thread. Iterators have `get_state()` and `set_state()`.
    """
    import grain  # takes seconds, and commands that only render examples do without it

    rows = range(batch_size) if rows is None else tuple(rows)
    source = data.open(seed, batch_size)
    given = fields_of(source, "offered" if mixed else "fields") if fields else ()
    missing = [name.split("|")[0] for name in fields if not set(name.split("|")) & set(given)]
    if missing:
        raise ConfigError(
            f"config.data.source={data.source}: its examples have no {', '.join(missing)}, which this stage learns from, but only "
            f"{', '.join(sorted(given))}; add what is missing, or set the share or weight of what needs it to 0"
        )
    if data.names and not mixed and not data.options.whole_batches and len(set(data.sizes)) > 1:
        raise ConfigError(
            f"config.data.parts: images of the sizes {data.sizes} meet in one batch; this stage needs one size, so give one, or set "
            "config.data.whole_batches=True"
        )
    examples = endless(source, seed)

    def batch(number: int) -> dict[str, Any]:
        return collate([examples[int(number) * batch_size + row] for row in rows])

    dataset = grain.MapDataset.range(ENDLESS if count is None else count).map(batch)
    if transform is not None:
        dataset = dataset.map(lambda examples: {"id": examples["id"]} | transform(examples))
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch))


def endless(source: Source, seed: int) -> Any:
    """The examples of a source by any index: a finite one is shuffled anew in every epoch."""
    import grain

    return source if len(source) >= ENDLESS else grain.MapDataset.source(source).shuffle(seed).repeat()


def fields_of(source: Source, of: str) -> frozenset[str]:
    """The names of what all examples of a source hold (`of` = "fields") or any of them ("offered")."""
    source = source.source if isinstance(source, Repeated) else source
    return getattr(source, of) if hasattr(source, of) else frozenset(source[0])


def first_batch(data: DataSection, seed: int, batch_size: int) -> dict[str, Any]:
    """The first batch of a source, collated."""
    return next(iter(batches(data, seed, batch_size, prefetch=0)))


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples of one batch -> one dict: arrays of one shape stacked, everything else as lists, with None where an example lacks it."""
    columns = {key: [example.get(key) for example in examples] for key in dict.fromkeys(key for example in examples for key in example)}
    return {key: np.stack(values) if _stackable(values) else values for key, values in columns.items()}


def _stackable(values: Sequence[Any]) -> bool:
    return all(isinstance(value, np.ndarray) for value in values) and len({value.shape for value in values}) == 1
