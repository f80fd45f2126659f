"""One suite from data to result file: outputs by the model, replies by the judge, one aggregation. Stoppable at any point.

Work is cut by item. Every process takes its share of the items, leaves out what anybody has finished, and appends what it finishes to a
file of its own (see `run_directory`); whoever finds everything finished writes the results. What a result holds depends on the items
alone: outputs on (model, settings, item, repeat) through static batches and counted keys, replies on the output, the aggregation on the
records sorted by id.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import StopRequested, StopSignal
from xomni_jax.evaluation.run_directory import RunDirectory, RunError, json_line
from xomni_jax.evaluation.suite import Item, Judge, Suite, SuiteError

SAVERS = 4  # threads that compress images
JUDGED_AT_ONCE = 4  # items in one call of a judge
PICTURES = (".png", ".webp", ".jpg")


@dataclass(frozen=True)
class Work:
    """What one process does of one suite.

    Attributes:
      items: the selected ones, in published order. data: says which data they were selected from, by number and hash.
      share: (k, n): this worker takes items k, k + n, ... of the selected ones.
      process: (k, n): which of n JAX processes this is, that make this share's outputs together on one mesh; the first one writes.
    """

    suite: Suite
    items: Sequence[Item]
    data: Mapping[str, Any]
    run: RunDirectory
    share: tuple[int, int] = (0, 1)
    process: tuple[int, int] = (0, 1)

    @property
    def worker(self) -> str:
        """Name of this worker's files."""
        return f"{self.share[0] + 1}-of-{self.share[1]}"

    @property
    def writes(self) -> bool:
        """Whether this process touches the run directory."""
        return self.process[0] == 0

    def mine(self) -> Sequence[Item]:
        """This worker's items."""
        return self.items[self.share[0] :: self.share[1]]

    def left(self) -> list[Item]:
        """This worker's items without outputs, the same on all its processes."""
        ids = {item.id for item in self.mine()} - set(self.outputs()) if self.writes else set()
        if self.process[1] > 1:
            ids = set(gather_json(sorted(ids))[0])
        return [item for item in self.mine() if item.id in ids]

    def outputs(self) -> dict[str, dict[str, Any]]:
        """id -> record of every finished output whose files are still there."""
        there = lambda record: all((self.run.path / name).is_file() for name in record.get("files", ()))  # noqa: E731
        return {name: record for name, record in self.run.lines("parts").items() if there(record)}

    def judged(self) -> dict[str, dict[str, Any]]:
        """id -> record of every judged item. RunError when the judge was asked something else than would be asked now."""
        records = self.run.lines("judged")
        for item in self.items:
            if item.id in records and records[item.id]["asked"] != asked(self.suite, item):
                where = self.run.path / "judged"
                raise RunError(
                    f"{where}: item {item.id} was judged by other questions; give the data and --instruction of then, or delete {where}"
                )
        return records


def asked(suite: Suite, item: Item) -> str:
    """A short name of what the judge is asked about an item."""
    return hashlib.sha256(json.dumps(list(suite.questions(item)), sort_keys=True).encode()).hexdigest()[:16]


def open_work(
    suite: Suite,
    data: str | Path,
    out: str | Path,
    limit: int | None = None,
    ids: Sequence[str] = (),
    share: tuple[int, int] = (0, 1),
    process: tuple[int, int] = (0, 1),
    rewritten: bool = False,
) -> Work:
    """Reads the data and selects `ids`, or the first `limit` items; `rewritten` says that the suite's prompts are not the published ones.

    Raises:
      SuiteError: the data are missing or malformed, an id occurs twice, or one that was asked for is not there.
      RunError: OUT was made from other data.
    """
    run, items = RunDirectory(out), suite.load(Path(data))
    known = {item.id for item in items}
    if len(known) < len(items):
        raise SuiteError(f"{suite.name}: {len(items) - len(known)} ids occur twice in {data}; ids must be unique")
    facts = sorted(json_line({"id": i.id, "prompt": i.prompt}) for i in items)  # not the truths: they decide no output
    described = {"items": len(items), "rewritten": rewritten, "sha256": hashlib.sha256("".join(facts).encode()).hexdigest()}
    if unknown := [name for name in ids if name not in known]:
        raise SuiteError(f"{suite.name} has no item {unknown[0]!r}; ids are such as {items[0].id!r}")
    selected = [item for item in items if item.id in set(ids)] if ids else items[:limit]
    work = Work(suite, selected, described, run, share, process)
    if work.writes and (run.path / "settings.json").exists():
        remedy = "take another --out, or the data, switches and rewritten prompts that it was begun with"
        run.check("settings.json", {"suite": suite.name, "data": described}, remedy)
    return work


# ---- outputs ----
def generate(work: Work, generation: Any, stop: StopSignal) -> None:
    """Draws this worker's items and saves them in the official layout; images are compressed while the next ones are drawn."""
    left = work.left()
    batches, overlong = generation.batches(left), set(generation.overlong(left))
    staging = work.run.path / ".drawing" / work.worker
    if work.writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process

    def save(item: Item, images: Sequence[Image.Image]) -> dict[str, Any]:
        return {**_save(work, staging, item, images), "overlong": item.id in overlong}

    with _appending(work, "parts", "drawn", len(left)) as add, ThreadPoolExecutor(SAVERS) as pool:
        saving: deque[list[Future]] = deque()
        for drawn in generation.draw(batches):
            saving.append([pool.submit(save, *one) for one in drawn] if work.writes else [])
            stopping = stop.reached()
            while len(saving) > (0 if stopping else 1):
                add(future.result() for future in saving.popleft())
            if stopping:
                raise StopRequested
        add(future.result() for futures in saving for future in futures)
    if work.writes:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            staging.parent.rmdir()  # unless another worker still uses it


def answer(work: Work, answering: Any, stop: StopSignal) -> None:
    """Answers this worker's items."""
    left = work.left()
    with _appending(work, "parts", "answered", len(left)) as add:
        for answers in answering.answer(answering.batches(left)):
            add({"id": item.id, "answer": text, "fitted": changed} for item, text, changed in answers)
            stop.check()


def _save(work: Work, staging: Path, item: Item, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Saves the images of one item through a folder of its own, which tells the names of the suite's layout."""
    folder = staging / hashlib.sha256(item.id.encode()).hexdigest()[:16]
    work.suite.save(folder, item, images)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        target = work.run.path / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)
    shutil.rmtree(folder)
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    files = [f"images/{name}" for name in names if name.endswith(PICTURES)]
    return {"id": item.id, "files": files, "pixels": digest.hexdigest()}


# ---- replies ----
def judge_outputs(work: Work, judge: Judge, stop: StopSignal) -> None:
    """Has this worker's items judged, a few at a time. The next images are opened meanwhile.

    Raises:
      SuiteError: images are missing (how many, and the first); the judge does not answer. What is judged stays.
    """
    judged = work.judged()
    left = [item for item in work.mine() if item.id not in judged]
    _check_images(work, left)
    remedy = f"give the judge that was used, or delete {work.run.path / 'judged'} to judge everything anew"
    work.run.claim("judged/judge.json", {"name": judge.name, "settings": judge.settings}, remedy)
    groups = [left[first : first + JUDGED_AT_ONCE] for first in range(0, len(left), JUDGED_AT_ONCE)]
    with _appending(work, "judged", "judged", len(left)) as add, ThreadPoolExecutor(1) as pool:
        opening = None
        for number, group in enumerate(groups):
            images = (opening or pool.submit(_open, work, group)).result()
            opening = pool.submit(_open, work, groups[number + 1]) if number + 1 < len(groups) else None
            questions = [work.suite.questions(item) for item, opened in zip(group, images) for _ in opened]
            replies = iter(judge.ask([image for opened in images for image in opened], questions))
            made = [{"id": item.id, "replies": [next(replies) for _ in opened]} for item, opened in zip(group, images)]
            add({**record, "asked": asked(work.suite, item)} for record, item in zip(made, group))
            stop.check()


def _open(work: Work, items: Sequence[Item]) -> list[list[Image.Image]]:
    return [work.suite.open(work.run.path / "images", item) for item in items]


def _check_images(work: Work, items: Sequence[Item]) -> None:
    """Before a judge is asked anything: are the images there, ours or somebody's in the official layout?"""
    outputs, missing = work.outputs(), []
    for item in items:
        if item.id not in outputs:
            try:
                work.suite.open(work.run.path / "images", item)
            except SuiteError as e:
                missing.append((item.id, e))
    if missing:
        many = f"{len(missing)} of {len(work.items)} items have no images, the first is {missing[0][0]}"
        raise SuiteError(f"{work.suite.name}: {many} ({missing[0][1]})")


# ---- results ----
def missing(work: Work, judged: bool = True) -> int:
    """Selected items without what scoring needs, or without outputs where `judged` is off, over all processes."""
    done = work.judged() if judged and work.suite.judge else work.outputs()
    return sum(item.id not in done for item in work.items)


def write_results(work: Work, switches: Sequence[str] = (), instructions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Scores every selected item once and aggregates, sorted by id. Everything must be there, see `missing`.

    `switches` and `instructions` are the choices that made the suite what it is, for the record.
    """
    suite, run = work.suite, work.run
    outputs, judged = work.outputs(), work.judged() if work.suite.judge else {}
    lines, records, unparsed = [], [], []
    for item in sorted(work.items, key=lambda item: item.id):
        output = outputs.get(item.id, {})
        replies = judged[item.id]["replies"] if suite.judge else [output["answer"]]
        record = suite.score(item, replies)
        made = {"images": output.get("files", []), "replies": replies} if suite.task == "generate" else {"answer": output["answer"]}
        shown = {"id": item.id, "prompt": item.prompt, "fields": dict(item.fields), **made}
        apart = {name: record[name] for name in ("score", "verdicts")}
        lines.append(json_line(shown | apart | {"record": {k: v for k, v in record.items() if k not in apart}}))
        records.append({**record, "id": item.id, "fields": item.fields})
        unparsed += [item.id] * bool(record["unparsed"])
    made = [outputs.get(item.id, {}) for item in work.items]
    found = suite.aggregate(records)
    results = {
        "suite": suite.name,
        "title": suite.title,
        "headline": {"name": found["headline"], "value": found["scores"][found["headline"]]},
        "scores": found["scores"],
        "categories": found["categories"],
        "counts": {
            "items": len(records),
            "published": suite.published,
            "outputs": len(records) * suite.repeats,
            "unparsed": sum(record["unparsed"] for record in records),
            "overlong prompts": sum(bool(output.get("overlong")) for output in made),
            "fitted images": sum(bool(output.get("fitted")) for output in made),
        },
        "unparsed": unparsed,
        "notes": found.get("notes", []),
        "settings": run.read("settings.json") if (run.path / "settings.json").exists() else None,
        "judge": run.read("judged/judge.json") if suite.judge else None,
        "switches": sorted(switches),
        "instructions": dict(instructions or {}),
    }
    run.write("items.jsonl", "".join(lines))
    run.write("results.json", json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return results


# ---- progress ----
@contextmanager
def _appending(work: Work, kind: str, verb: str, count: int) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """Yields what stores finished records and moves the progress line. A full disk is one sentence."""
    if not work.writes:
        yield deque(maxlen=0).extend  # uses its argument up, which keeps the processes in step
        return
    mine = len(work.mine())
    title = f"{work.suite.name} {verb}" + (f" ({work.worker})" if work.share[1] > 1 else "")
    bar = tqdm(total=mine, initial=mine - count, desc=title, unit="item", dynamic_ncols=True, mininterval=0.5, smoothing=0.1)
    try:
        with work.run.writer(kind, work.worker) as lines, bar:

            def add(records: Iterable[Mapping[str, Any]]) -> None:
                for record in records:
                    lines.append(record)
                    bar.update()

            yield add
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        full = f"{work.run.path}: {os.strerror(e.errno)}; what is finished is kept"
        raise RunError(f"{full}: make room or mend it, the same command goes on from there") from None
