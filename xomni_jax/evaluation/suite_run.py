"""One evaluation of one suite: its configuration, the items of this process, and what is finished of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from xomni_jax.evaluation.run_directory import RunDirectory, RunError
from xomni_jax.evaluation.suite import Item, Suite

if TYPE_CHECKING:
    from xomni_jax.inference import InferenceConfig


def _released_inference() -> InferenceConfig:
    from xomni_jax.inference import InferenceConfig

    return InferenceConfig()


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation of one suite by one model.

    Attributes:
      suite: name of the suite, see `suites.get_suite`, or a Suite itself
      out: directory of the run; give the same one to continue it
      data: directory of the published files; not read by suites that make their own items
      phase: "generate" or "answer" runs the model, "score" the judge or the local rules, "all" does both
      limit: evaluate the first so many items only
      ids: evaluate these items only
      shard: (k, n): this process takes items k, k + n, ... (k from 0) of those that n processes share
      inference: model, image size, sampling and batch sizes; a size of None is that of the suite, or else of the model
      components: whether the model's components are computed as the sections of `inference` say, or as they are stored
      mesh: devices per mesh axis; None: all devices along "fsdp"
      seed: of the images, 0 to 2**32 - 1; the released command's by default
      rewrite: source of rewritten prompts, see `suites.rewriting.FORMS`; None: the published prompts
      judges: kind of judge -> which one, see `judges.HELP`; a kind that is not named gets its local judge
      switches: departures from the official scorer that are on
      instructions: name -> wording, in place of that of `suite.INSTRUCTIONS`
      repeats_per_call: images of one prompt in one call of the sampler; None: as many as the batch allows
      reconstruct: decode the codes of each item's own image instead of sampled ones
      reencode: record with each image how many codes come back when it is encoded again
      report: write report.html and results.csv beside the results
    """

    suite: str | Suite
    out: str | Path
    data: str | Path = "."
    phase: str = "all"
    limit: int | None = None
    ids: Sequence[str] = ()
    shard: tuple[int, int] = (0, 1)
    inference: InferenceConfig = field(default_factory=_released_inference)
    components: bool = False
    mesh: Mapping[str, int] | None = None
    seed: int = 1234
    rewrite: str | None = None
    judges: Mapping[str, str] = field(default_factory=dict)
    switches: Sequence[str] = ()
    instructions: Mapping[str, str] = field(default_factory=dict)
    repeats_per_call: int | None = None
    reconstruct: bool = False
    reencode: bool = False
    report: bool = True


@dataclass(frozen=True)
class SuiteRun:
    """What one process does of one suite.

    Attributes:
      items: the selected ones, in published order. data: describes the data they were selected from, by number and hash.
      process: (k, n): which of n JAX processes this is, which make this share's outputs together on one mesh; the first one writes.
    """

    config: EvalConfig
    suite: Suite
    items: Sequence[Item]
    data: Mapping[str, Any]
    directory: RunDirectory
    process: tuple[int, int] = (0, 1)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def worker(self) -> str:
        """Name of this worker's files."""
        k, n = self.config.shard
        return f"{k + 1}-of-{n}"

    @property
    def writes(self) -> bool:
        """Whether this process writes into the run directory."""
        return self.process[0] == 0

    @property
    def scores(self) -> bool:
        """Whether this evaluation scores."""
        return self.config.phase in ("all", "score")

    def mine(self) -> Sequence[Item]:
        """This worker's items."""
        k, n = self.config.shard
        return self.items[k::n]

    def outputs(self) -> dict[str, dict[str, Any]]:
        """id -> record of every finished output whose files still exist."""
        exist = lambda record: all((self.path / name).is_file() for name in record.get("files", ()))  # noqa: E731
        return {name: record for name, record in self.directory.lines("parts").items() if exist(record)}

    def judged(self) -> dict[str, dict[str, Any]]:
        """id -> record of every judged item. Raises RunError when the judge was asked something else than it would be asked now."""
        records = self.directory.lines("judged")
        for item in self.items:
            if item.id in records and records[item.id]["asked"] != questions_hash(self.suite, item):
                where = self.path / "judged"
                raise RunError(
                    f"{where}: item {item.id} was judged by other questions; give the data and --instruction of then, or delete {where}"
                )
        return records

    def missing(self) -> int:
        """Selected items, over all processes, that lack what this phase makes: replies of the judge, or outputs."""
        done = self.judged() if self.scores and self.suite.judge else self.outputs()
        return sum(item.id not in done for item in self.items)

    @contextmanager
    def appending(self, kind: str, verb: str, count: int) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
        """Yields a function that stores finished records of "parts" or "judged" and moves the progress bar.

        Raises:
          RunError: the disk is full or not writable.
        """
        if not self.writes:
            yield deque(maxlen=0).extend  # consumes its argument, which keeps the processes in step
            return
        total = len(self.mine())
        title = f"{self.suite.name} {verb} in {self.path.name}" + (f" ({self.worker})" if self.config.shard[1] > 1 else "")
        bar = tqdm(total=total, initial=total - count, desc=title, unit="item", dynamic_ncols=True, mininterval=0.5, smoothing=0.1)
        try:
            with self.directory.writer(kind, self.worker) as lines, bar:

                def add(records: Iterable[Mapping[str, Any]]) -> None:
                    for record in records:
                        lines.append(record)
                        bar.update()

                yield add
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            full = f"{self.path}: {os.strerror(e.errno)}; what is finished is kept"
            raise RunError(f"{full}: make room or fix it, the same command goes on from there") from None


def questions_hash(suite: Suite, item: Item) -> str:
    """A short name of what the judge is asked about an item."""
    return hashlib.sha256(json.dumps(list(suite.questions(item)), sort_keys=True).encode()).hexdigest()[:16]
