"""Images of all prompts of files: in full batches, so that an interruption loses no more than the batches under way.

OUT/
  drawn.json      what decides the images: prompts, model and its hash, sizes, sampling, seed, reward. A command with others is refused
  images/         PPPPPP_S.png: sample S of prompt P, both from 0; the file says how it was made
  parts/*.jsonl   what is finished, a line each, one file per share of the work; see `run_directory`
  metadata.jsonl  when all shares are done: file_name, text, id, seed, index, perhaps reward, and the prompt's own columns; data sources
                  read the folder with it
  contact_sheet.html  likewise: all images beside their prompts

Sample S of prompt P is image P of seed + S, as `xomni generate` with all prompts at once, or `xomni serve` with seed and index, draws it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from xomni_jax.checkpoint.store import checkpoint_hash
from xomni_jax.core.preemption import Outage, StopRequested, StopSignal
from xomni_jax.data.files import Records
from xomni_jax.data.png import png_bytes
from xomni_jax.data.records import Columns, Record
from xomni_jax.data.tables import FaultyRecord
from xomni_jax.evaluation.pages import write_page
from xomni_jax.evaluation.run_directory import RunDirectory, RunError, json_line
from xomni_jax.inference import InferenceConfig
from xomni_jax.pipeline import XOmni
from xomni_jax.rewards.best import best_first, score_prompt
from xomni_jax.sampling.batches import Batch, batches_by_shape, make_batches, run_batches
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sequence.padding import bucket

if TYPE_CHECKING:
    from xomni_jax.rewards.client import RewardClient

SAVERS = 4  # threads that compress images
_SHORTEST = 32  # tokens that prompts are padded to at least, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class PromptFiles:
    """What is drawn.

    Attributes:
      paths: files of prompts, of any kind that data sources read.
      seed: sample S of a prompt is drawn with seed + S.
      samples: images that are kept of each prompt.
      best_of: candidates that these are chosen from by the reward; 0: all are kept.
      share: (k, n): this process draws every n-th image or prompt, from k on.
    """

    paths: tuple[str, ...]
    seed: int = 0
    samples: int = 1
    best_of: int = 0
    share: tuple[int, int] = (0, 1)

    @property
    def candidates(self) -> int:
        """Images that are drawn of each prompt."""
        return max(self.samples, self.best_of)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What is finished at once: an image, or with best_of all candidates of a prompt."""

    prompt: int
    candidates: range

    @property
    def id(self) -> str:
        return f"{self.prompt:06d}" + f"_{self.candidates[0]}" * (len(self.candidates) == 1)


class PromptFileRun:
    """The images of prompt files in a folder of their own, which several processes may share.

    Raises:
      ValueError: a prompt cannot be drawn, which is found before anything is, or the folder holds something else.
    """

    def __init__(self, what: PromptFiles, model: XOmni, config: InferenceConfig, out: Path, reward: RewardClient | None = None):
        self.what, self.model, self.config, self.reward, self.path = what, model, config, reward, out
        self.directory = RunDirectory(out, "set of drawn images")
        self.records = self._read()
        image_keys(what.seed + what.candidates - 1, 1)  # refuses a seed out of range
        self.sizes = [record.size or model.image_size(config.height, config.width) for record in self.records]
        self.lengths = [self._length(record, size) for record, size in zip(self.records, self.sizes)]
        each = [range(what.candidates)] if what.best_of else [range(s, s + 1) for s in range(what.samples)]
        self.units = [_Unit(p, c) for p in range(len(self.records)) for c in each]
        self.about = {"model": str(model.path), "sha256": checkpoint_hash(model.path)}

    def _read(self) -> list[Record]:
        records = Records(self.what.paths, Columns(), prompts=True)
        try:
            found = [records[n] for n in range(len(records))]
        except FaultyRecord as fault:
            raise RunError(f"{fault}; correct it") from None
        if not found:
            raise RunError(f"{', '.join(self.what.paths)}: holds no prompts; give a file with a prompt in every line, jsonl or csv")
        return found

    def _length(self, record: Record, size: tuple[int, int]) -> int:
        try:
            self.model.check_prompts(record.texts[:1])
            return len(self.model.tokenizer.generation_prompt(record.texts[0], *self.model.grid(*size)))
        except ValueError as error:
            raise RunError(f"{record.where}: {str(error).removeprefix('prompt 1 ')}") from None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images."""
        w, health = self.what, self.reward.connect() if self.reward else None
        prompts = json.dumps([[r.texts[0], dict(r.targets), size] for r, size in zip(self.records, self.sizes)], sort_keys=True)
        return self.about | {
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            "seed": w.seed, "samples": w.samples, "best_of": w.best_of, "batch": self.config.batch,
            "sampling": vars(self.config.sampling), "mesh": {axis: self.model.mesh.shape[axis] for axis in ("fsdp", "tensor")},
            "reward": health and {"name": health.scorer, "version": health.version, "model_hash": health.model_hash},
        }  # fmt: skip

    def make(self, stop: StopSignal) -> tuple[int, int]:
        """Draws what is not there yet of this share: (images kept so far by all shares, images kept when all are done).

        Raises:
          StopRequested: what is finished is kept.
          Outage: the reward service does not answer.
        """
        kept = len(self.records) * self.what.samples
        free = "take another --out, or the settings that it was begun with"
        self.directory.claim("drawn.json", self.settings, free)
        k, n = self.what.share
        done, mine = self.directory.lines("parts"), self.units[k::n]
        left = [unit for unit in mine if unit.id not in done]
        (self.path / "images").mkdir(exist_ok=True)
        count = lambda units: sum(len(unit.candidates) for unit in units)
        bar = tqdm(
            total=count(mine), initial=count(mine) - count(left), desc=f"drawn in {self.path.name}", unit="image", dynamic_ncols=True
        )
        with self.directory.writer("parts", f"{k + 1}-of-{n}") as lines, ThreadPoolExecutor(SAVERS) as pool, bar:
            for drawn in self._drawn(left):
                for record in self._finished(drawn, pool):
                    lines.append(record)
                    bar.update(record["drawn"])
                if stop.reached():
                    raise StopRequested
        done = self.directory.lines("parts")  # also of the other shares
        if len(done) == len(self.units):
            self._conclude(done)
        return sum(len(record["files"]) for record in done.values()), kept

    def _drawn(self, units: Sequence[_Unit]) -> Iterator[list[tuple[_Unit, list[Image.Image]]]]:
        """Batch by batch the units that are complete with it; the device draws the next batch meanwhile."""
        items = [(unit, candidate) for unit in units for candidate in unit.candidates]
        shapes = [(self.sizes[unit.prompt], bucket(max(_SHORTEST, self.lengths[unit.prompt]))) for unit, _ in items]
        parts: dict[_Unit, list[Image.Image]] = defaultdict(list)
        batches = batches_by_shape(shapes, self.config.batch * self.model.num_data_shards)
        for batch, images_BHWC in run_batches(lambda batch: self._start(batch, items), batches):
            complete = []
            for i, image in zip(batch.items, images_BHWC):
                unit = items[i][0]
                parts[unit].append(Image.fromarray(image))
                if len(parts[unit]) == len(unit.candidates):
                    complete.append((unit, parts.pop(unit)))
            yield complete

    def _start(self, batch: Batch, items: Sequence[tuple[_Unit, int]]) -> jax.Array:
        """Dispatches a batch without waiting for it: images [B, H, W, 3]."""
        rows = [(unit.prompt, candidate) for unit, candidate in batch.take(items)]
        size, length = batch.shape
        grid = self.model.grid(*size)
        prompts = [self.records[p].texts[0] for p, _ in rows]
        keys_B, noise_keys_B = (self._keys(rows, purpose) for purpose in (0, NOISE))
        codes_BYX = self.model.sample_codes(prompts, grid, keys_B[:, None], self.config.sampling, length)["codes"][:, 0]
        images = []
        for part in make_batches(len(rows), self.config.decode_batch * self.model.num_data_shards):
            noise_BTC = self.model.noise(part.take(noise_keys_B), grid)
            images.append(part.cut(self.model.decode_images(part.take(codes_BYX), part.take(prompts), noise_BTC)))
        return jnp.concatenate(images)

    def _keys(self, rows: Sequence[tuple[int, int]], purpose: int) -> jax.Array:
        return jnp.concatenate([image_keys(self.what.seed + s, np.array([p]), purpose) for p, s in rows])

    def _finished(self, drawn: Sequence[tuple[_Unit, list[Image.Image]]], pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
        """Chooses and saves the images of units; what is recorded of each."""
        saved = []
        for unit, images in drawn:
            order, values = list(range(len(images))), None
            if self.reward is not None:
                record = self.records[unit.prompt]
                scores = score_prompt(self.reward, images, record.texts[0], dict(record.targets))
                if any(score.kind == "unanswered" for score in scores):
                    raise Outage(f"{self.reward.name} does not answer; the same command goes on when it does")
                order, values = best_first(scores)[: self.what.samples], [score.value for score in scores]
            files = {f"images/{unit.prompt:06d}_{unit.candidates[i]}.png": i for i in order}
            jobs = [pool.submit(self._save, name, unit, i, images[i]) for name, i in files.items()]
            chosen = {"seeds": [self.what.seed + unit.candidates[i] for i in order]}
            chosen |= {"rewards": [values[i] for i in order], "all_rewards": values} if values is not None else {}
            saved.append((jobs, {"id": unit.id, "prompt": unit.prompt, "files": list(files), "drawn": len(images), **chosen}))
        for jobs, record in saved:
            for job in jobs:
                job.result()
            yield record

    def _save(self, name: str, unit: _Unit, candidate: int, image: Image.Image) -> None:
        """Writes an image whole or not at all."""
        seed = {"seed": self.what.seed + unit.candidates[candidate], "index": unit.prompt, "size": f"{image.width}x{image.height}"}
        path = self.path / name
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(png_bytes(image, self.records[unit.prompt].texts[0], self.about | seed | vars(self.config.sampling)))
        os.replace(part, path)

    def _conclude(self, done: Mapping[str, dict[str, Any]]) -> None:
        rows = []
        for record in sorted(done.values(), key=lambda record: record["files"]):
            asked = self.records[record["prompt"]]
            for n, (file, seed) in enumerate(zip(record["files"], record["seeds"])):
                row = {"file_name": file, "text": asked.texts[0], "id": Path(file).stem, "seed": seed, "index": record["prompt"]}
                reward = {"reward": record["rewards"][n]} if "rewards" in record else {}
                own = {"targets": dict(asked.targets)} if asked.targets else {}
                rows.append(dict(asked.metadata) | own | row | reward)
        self.directory.write("metadata.jsonl", "".join(map(json_line, rows)))
        write_page(self.path / "contact_sheet.html", "contact_sheet.html", title=f"Images of {self.path.resolve().name}", rows=rows)
