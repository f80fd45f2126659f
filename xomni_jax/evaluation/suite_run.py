"""One evaluation of one suite: its configuration, the items of this process, and what is finished of them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from xomni_jax.evaluation.judges.preparation import ChatOptions
from xomni_jax.evaluation.run_directory import RunDirectory, RunError, json_line
from xomni_jax.evaluation.suite import GridLayout, Item, Suite, SuiteError, check_id
from xomni_jax.evaluation.suites import get_suite

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
      sample: evaluate so many items only, drawn by the seed from all categories in proportion; a larger sample holds a smaller one
      ids: evaluate these items only
      repeats: images per prompt; None: as the suite has it
      official: refuse whatever would keep the result from standing beside published numbers
      shard: (k, n): this process takes items k, k + n, ... (k from 0) of those that n processes share
      inference: model, image size, sampling and batch sizes; a size of None is that of the suite, or else of the model
      adapter: directory of adapters that are added to the model, RUN/adapter of a training
      components: whether the model's components are computed as the sections of `inference` say, or as they are stored
      mesh: devices per mesh axis; None: all devices along "fsdp"
      seed: of the images, 0 to 2**32 - 1; the released command's by default
      rewrite: source of rewritten prompts, see `suites.rewriting.FORMS`; None: the published prompts
      images: folder of images that another program drew, in place of a model, see `others.FolderImages`
      answers: file with the answers of another program, in place of a model, see `others.FileAnswers`
      judges: kind of judge -> which one, see `judges.HELP`; a kind that is not named gets its local judge
      chat: how chat models are asked, as judges and as models that answer
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
    sample: int | None = None
    ids: Sequence[str] = ()
    repeats: int | None = None
    official: bool = False
    shard: tuple[int, int] = (0, 1)
    inference: InferenceConfig = field(default_factory=_released_inference)
    adapter: str | None = None
    components: bool = False
    mesh: Mapping[str, int] | None = None
    seed: int = 1234
    rewrite: str | None = None
    images: str | None = None
    answers: str | None = None
    judges: Mapping[str, str] = field(default_factory=dict)
    chat: ChatOptions = ChatOptions()
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
      positions: id -> place in the published order, from 0, over all items of the data.
      process: (k, n): which of n JAX processes this is, which make this share's outputs together on one mesh; the first one writes.
    """

    config: EvalConfig
    suite: Suite
    items: Sequence[Item]
    data: Mapping[str, Any]
    positions: Mapping[str, int]
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

    @property
    def judge_kind(self) -> str | None:
        """The kind of judge that is asked: that of the suite, or its `fallback` if one is configured."""
        return self.suite.judge or (self.suite.fallback if self.suite.fallback in self.config.judges else None)

    def questions(self, item: Item, outputs: Mapping[str, Any]) -> list[Sequence[Any]]:
        """What the judge is asked about each output of an item; `outputs` are those of the run, see `outputs`."""
        if self.suite.judge:
            return [self.suite.questions(item)] * self.suite.repeats
        question = self.suite.undecided(item, outputs[item.id]["answer"])
        return [(question,) if question else ()]

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
        records, outputs = self.directory.lines("judged"), {} if self.suite.judge else self.outputs()
        for item in self.items:
            if item.id in records and records[item.id]["asked"] != questions_hash(self.questions(item, outputs)):
                where = self.path / "judged"
                raise RunError(
                    f"{where}: item {item.id} was judged by other questions; give the data and --instruction of then, or delete {where}"
                )
        return records

    def missing(self) -> int:
        """Selected items, over all processes, that lack what this phase makes: replies of the judge, or outputs."""
        done = self.judged() if self.scores and self.judge_kind else self.outputs()
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


def questions_hash(questions: Sequence[Sequence[Any]]) -> str:
    """A short name of what the judge is asked about an item, which is the same for all its outputs."""
    return hashlib.sha256(json.dumps(list(questions[0]), sort_keys=True).encode()).hexdigest()[:16]


def open_run(config: EvalConfig, process: tuple[int, int] = (0, 1)) -> SuiteRun:
    """Reads the data and selects the items.

    Raises:
      SuiteError: the data are missing or malformed, or items or images per prompt are asked for that the suite does not have.
      RunError: the directory cannot be written, or was begun with other data.
    """
    directory = RunDirectory(config.out)
    suite = config.suite if isinstance(config.suite, Suite) else get_suite(config.suite, config.switches, config.instructions)
    if config.repeats and suite.task == "generate":
        if isinstance(suite, GridLayout) and math.isqrt(config.repeats) ** 2 != config.repeats:
            raise SuiteError(f"{suite.name} tiles the images of a prompt as a square; give --repeats 1, 4 or 9")
        suite.repeats = config.repeats
    if config.rewrite:
        from xomni_jax.evaluation.suites.rewriting import with_rewrites

        suite = with_rewrites(suite, config.rewrite, Path(config.out) / "rewritten.jsonl")
    items = suite.load(Path(config.data))
    positions = {item.id: n for n, item in enumerate(items)}
    if len(positions) < len(items):
        raise SuiteError(f"{suite.name}: {len(items) - len(positions)} ids occur twice in {config.data}; ids must be unique")
    for item in items:
        check_id(item.id, suite.name)
    lines = sorted(json_line({"id": i.id, "prompt": i.prompt}) for i in items)  # not the fields: they decide no output
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    data = {"items": len(items), "rewritten": bool(config.rewrite), "sha256": digest}
    run = SuiteRun(config, suite, select_items(suite, items, config), data, positions, directory, process)
    if run.writes and (run.path / "settings.json").exists():
        remedy = "take another --out, or the data, switches, repeats and rewritten prompts that it was begun with"
        repeats = {"repeats": suite.repeats} if suite.task == "generate" else {}
        directory.check("settings.json", {"suite": suite.name, "data": data, **repeats}, remedy)
    return run


def select_items(suite: Suite, items: Sequence[Item], config: EvalConfig) -> Sequence[Item]:
    """The items that the configuration asks for, in published order. SuiteError when one does not exist."""
    if sum(map(bool, (config.limit, config.sample, config.ids))) > 1:
        raise SuiteError("--limit, --sample and --ids each choose items; give one of them")
    known = {item.id for item in items}
    if unknown := [name for name in config.ids if name not in known]:
        raise SuiteError(f"{suite.name} has no item {unknown[0]!r}; ids are such as {items[0].id!r}")
    wanted = sample(items, config.sample, config.seed) if config.sample else set(config.ids)
    return [item for item in items if item.id in wanted] if wanted else items[: config.limit]


def sample(items: Sequence[Item], number: int, seed: int) -> set[str]:
    """The ids of about `number` items, spread evenly over the categories; rotations of one question stay together.

    Questions are ordered by category, and by chance within it, and each gets its place on the scale from 0 to 1 in its category: those
    with the lowest places are taken. So categories are represented in proportion, and a larger sample contains a smaller one.
    """
    questions: dict[str, list[Item]] = {}
    for item in items:
        questions.setdefault(str(item.fields.get("group", item.id)), []).append(item)
    chance = {name: hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in questions}
    categories: dict[str, list[str]] = {}
    for name in sorted(questions, key=chance.__getitem__):
        categories.setdefault(str(questions[name][0].fields.get("category", "")), []).append(name)
    places = {name: ((n + 0.5) / len(names), chance[name]) for names in categories.values() for n, name in enumerate(names)}
    return {item.id for name in sorted(places, key=places.__getitem__)[:number] for item in questions[name]}
