"""The model's side of an evaluation: opens the model, records the settings that decide its outputs, makes them and saves them.

An output must not depend on which items happen to be in the same batch. A row of a batch depends on its own prompt and keys alone, but
programs of other shapes may round differently: so a prompt is padded to a length that its own length decides, and every batch has the
same number of rows. Then an item drawn or answered alone equals the item in any batch, to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.checkpoint.store import checkpoint_hash
from xomni_jax.core.config import as_dict
from xomni_jax.core.distributed import connect, gather_json
from xomni_jax.core.preemption import StopRequested, StopSignal
from xomni_jax.data.preprocess import ImageLimits, preprocess, to_pixels, token_grid
from xomni_jax.evaluation.others import image_digest, other_source
from xomni_jax.evaluation.suite import Item, Suite, SuiteError, check_images
from xomni_jax.evaluation.suite_run import EvalConfig, SuiteRun
from xomni_jax.inference import MODELS, open_model
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import Batch, batches_by_shape, in_order, make_batches, run_batches
from xomni_jax.sampling.keys import NOISE
from xomni_jax.sequence.padding import IMAGE_STEPS, bucket
from xomni_jax.sharding.mesh import make_mesh

VERSIONS = ("xomni_jax", "jax", "jaxlib", "flax", "transformers")
SAVERS = 4  # threads that compress images
SHORTEST = 32  # tokens that prompts and questions are padded to at least
READERS = 4  # threads that read images


def model_opener(config: EvalConfig) -> Callable[[], XOmni]:
    """A function that opens the configured model on its mesh, once."""

    @functools.cache
    def opened() -> XOmni:
        mesh = make_mesh(config.mesh)
        connect(mesh)
        model = open_model(config.inference.model, mesh, config.inference if config.components else None)
        if config.adapter:
            model.adapt(config.adapter)
        return model

    return opened


def make_outputs(run: SuiteRun, model: Callable[[], XOmni], stop: StopSignal) -> None:
    """Makes this process's outputs that do not exist yet.

    Raises:
      SuiteError: an image of a question is missing, or a prompt, an image or the source of outputs does not suit the suite.
      RunError: the directory holds outputs of other settings.
      StopRequested: what is finished is kept.
    """
    if not run.config.answers:
        check_images(run.items)
    source = other_source(run) or OwnModel(model(), run)
    if run.writes:
        settings = {"suite": run.suite.name, "data": run.data, **source.settings}
        run.directory.claim("settings.json", settings, "take another --out, or the settings that it was begun with")
    left = _unfinished_items(run)
    if run.suite.task == "generate":
        _save_images(run, left, source.make(left), stop)
        return
    with run.appending("parts", "answered", len(left)) as add:
        for answers in source.make(left):
            add({"id": item.id, **answer} for item, answer in answers)
            stop.check()


class OwnModel:
    """A model of ours as the source of outputs. `settings` is everything that decides them.

    Data-parallel axes of the mesh are left out: each part computes in the same shapes, however many there are.
    """

    def __init__(self, model: XOmni, run: SuiteRun):
        config, device = run.config, jax.devices()[0]
        generation = Generation(model, run.suite, config) if run.suite.task == "generate" else None
        self.make = generation.draw if generation else functools.partial(answer, model, run.suite, config.inference.batch)
        self.settings = {
            "model": described_model(config),
            "batch": config.inference.batch,
            **(generation.settings if generation else {"max_new_tokens": run.suite.max_new_tokens}),
            **({"computed": {name: as_dict(getattr(config.inference, name)) for name in ("decode", *MODELS)}} if config.components else {}),
            "mesh": {axis: model.mesh.shape[axis] for axis in ("fsdp", "tensor")},
            "device": f"{device.platform} {device.device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }


def described_model(config: EvalConfig) -> dict[str, str]:
    """Where a model lies, with its adapters if it has some, and a fingerprint of both."""
    path, digest = str(config.inference.model), checkpoint_hash(config.inference.model)
    if not config.adapter:
        return {"path": path, "sha256": digest}
    both = hashlib.sha256((digest + checkpoint_hash(config.adapter)).encode()).hexdigest()
    return {"path": path, "adapter": config.adapter, "sha256": both}


def _unfinished_items(run: SuiteRun) -> list[Item]:
    """This worker's items without outputs, the same on all its processes."""
    ids = {item.id for item in run.mine()} - set(run.outputs()) if run.writes else set()
    if run.process[1] > 1:
        ids = set(gather_json(sorted(ids))[0])
    return [item for item in run.mine() if item.id in ids]


def _save_images(run: SuiteRun, left: Sequence[Item], batches: Iterable[Sequence[tuple[Any, ...]]], stop: StopSignal) -> None:
    """Saves images in the official layout; they are compressed while the next ones are made."""
    staging = run.path / ".drawing" / run.worker
    if run.writes:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    with run.appending("parts", "drawn", len(left)) as add, ThreadPoolExecutor(SAVERS) as pool:
        saving: deque[list[Future]] = deque()
        for drawn in batches:
            saving.append([pool.submit(_save, run, staging, *one) for one in drawn] if run.writes else [])
            stopping = stop.reached()
            while len(saving) > (0 if stopping else 1):
                add(future.result() for future in saving.popleft())
            if stopping:
                raise StopRequested
        add(future.result() for futures in saving for future in futures)
    if run.writes:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            staging.parent.rmdir()  # unless another worker still uses it


def _save(run: SuiteRun, staging: Path, item: Item, images: Sequence[Image.Image], more: Mapping[str, Any]) -> dict[str, Any]:
    """Saves the images of one item by way of an empty folder, which tells the file names of the suite's layout."""
    folder = staging / hashlib.sha256(item.id.encode()).hexdigest()[:16]
    run.suite.save(folder, item, images)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        target = run.path / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, target)
    shutil.rmtree(folder)
    files = [f"images/{name}" for name in names if name.endswith((".png", ".webp", ".jpg"))]
    return {"id": item.id, "files": files, "pixels": image_digest(images), **more}


class Generation:
    """Draws the items of one suite with one model. `settings` is what decides the images, for the record."""

    def __init__(self, model: XOmni, suite: Suite, config: EvalConfig):
        self.model, self.suite, self.config, inference = model, suite, config, config.inference
        own = model.description.get("settings", {}).get("size", {})
        height, width = suite.size or (own.get("height", 1152), own.get("width", 1152))
        height, width = inference.height or height, inference.width or width
        self.grid = model.grid(height, width)
        self.sampling = inference.sampling
        R, batch = suite.repeats, inference.batch
        self.per_call = config.repeats_per_call or max(r for r in range(1, R + 1) if R % r == 0 and (r == 1 or r <= batch))
        self.rows, self.decode_rows = max(1, batch // self.per_call) * model.num_data_shards, inference.decode_batch * model.num_data_shards
        self.settings = {"height": height, "width": width, "seed": config.seed, "sampling": dataclasses.asdict(self.sampling)}
        self.settings |= {"repeats": R, "batch": batch, "decode_batch": inference.decode_batch}
        self.settings |= {name: on for name in ("repeats_per_call", "reconstruct", "reencode") if (on := getattr(config, name))}

    def draw(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, list[Image.Image], dict[str, Any]]]]:
        """Batch by batch (item, images, what else is recorded of it); the device draws the next batch meanwhile.

        "overlong" marks a prompt that is drawn whole, but decoded to pixels from its beginning: the text encoder takes no more.

        Raises:
          SuiteError: the prompt of an item cannot be drawn.
        """
        limit = self.model.decode_config.text_length - 1
        batches = batches_by_shape([bucket(max(SHORTEST, self._length(item))) for item in items], self.rows)
        for batch, (images_PRHWC, codes_PRYX) in run_batches(lambda batch: self._start(batch, items), batches):
            more = [{"overlong": self.model.decoder_tokens(items[i].prompt) > limit} for i in batch.items]
            if self.config.reencode:
                again = self._encode(images_PRHWC.reshape(-1, *images_PRHWC.shape[2:])).reshape(codes_PRYX.shape)
                agreement_PR = (np.asarray(codes_PRYX) == again).reshape(*again.shape[:2], -1).mean(-1)
                more = [m | {"agreement": row_R.tolist()} for m, row_R in zip(more, agreement_PR)]
            drawn = [[Image.fromarray(image) for image in images_RHWC] for images_RHWC in images_PRHWC]
            yield [(items[i], *one) for i, *one in zip(batch.items, drawn, more)]

    def _length(self, item: Item) -> int:
        if not item.prompt.strip():
            raise SuiteError(f"{self.suite.name}: the prompt of item {item.id} is empty; correct the data")
        try:
            return len(self.model.tokenizer.generation_prompt(item.prompt, *self.grid))
        except ValueError as e:
            raise SuiteError(f"{self.suite.name}: item {item.id}: {e}") from None

    def _start(self, batch: Batch, items: Sequence[Item]) -> tuple[jax.Array, jax.Array]:
        """Dispatches a batch without waiting for it: images [P, R, H, W, 3] and codes [P, R, Y, X] of its P items."""
        seed, R, P = self.config.seed, self.suite.repeats, len(batch.items)
        prompts, ids = batch.take([item.prompt for item in items]), batch.take([item.id for item in items])
        if self.config.reconstruct:
            codes_BYX = jnp.asarray(self._encode(np.stack([np.asarray(items[i].image()) for i in batch.items])))
        else:
            keys_PR = self.suite.keys(seed, ids, R, 0)
            calls = [keys_PR[:, r : r + self.per_call] for r in range(0, R, self.per_call)]
            parts = [self.model.sample_codes(prompts, self.grid, keys, self.sampling, batch.shape)["codes"] for keys in calls]
            codes_BYX = jnp.concatenate(parts, axis=1).reshape(-1, *self.grid)
        noise_keys = self.suite.keys(seed, ids, R, NOISE).reshape(-1)
        texts = [prompt for prompt in prompts for _ in range(R)]
        images = []
        for part in make_batches(P * R, self.decode_rows):
            noise_BTC = self.model.noise(part.take(noise_keys), self.grid)
            images.append(self.model.decode_images(part.take(codes_BYX), part.take(texts), noise_BTC))
        images_BHWC = jnp.concatenate(images)[: P * R]
        return images_BHWC.reshape(P, R, *images_BHWC.shape[1:]), codes_BYX[: P * R].reshape(P, R, *self.grid)

    def _encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Codes [B, Y, X] of uint8 images of one size."""
        program = lambda part: self.model.encode_pixels(to_pixels(part.take(images_BHWC)))
        return np.stack(in_order(run_batches(program, make_batches(len(images_BHWC), self.decode_rows))))


def answer(model: XOmni, suite: Suite, batch_size: int, items: Sequence[Item]) -> Iterator[list[tuple[Item, dict[str, Any]]]]:
    """Batch by batch (item, {"answer", "fitted": whether its image had to be changed, "image": digest}).

    Images are read while the device answers.

    Args:
      batch_size: questions at a time, by each data-parallel part of the mesh.

    Raises:
      SuiteError: an image cannot be read, or a question cannot be asked.
    """
    limits, more = model.preprocess_config, dict[int, dict[str, Any]]()

    def image_of(item: Item) -> Image.Image:
        try:
            return item.image().convert("RGB")
        except SuiteError:
            raise
        except (OSError, ValueError) as e:
            raise SuiteError(f"{suite.name}: the image of item {item.id} cannot be read ({e}); fetch it again") from None

    def length(item: Item) -> int:
        grid = token_grid(*fitted_sizes(image_of(item).size, limits)[1], limits)
        try:
            return len(model.tokenizer.understanding_prompt(np.zeros(grid, np.int32), item.prompt))
        except ValueError as e:
            raise SuiteError(f"{suite.name}: item {item.id}: {e}") from None

    def pixels_of(i: int) -> np.ndarray:
        original = image_of(items[i])
        image, fitted = fit(original, limits)
        more[i] = {"fitted": fitted, "image": image_digest([original])}
        return preprocess(image, limits)

    with ThreadPoolExecutor(READERS) as pool:

        def start(batch: Batch) -> jax.Array:
            codes = dict(zip(batch.items, model.encode_ragged(list(pool.map(pixels_of, batch.items)))))
            questions = batch.take([item.prompt for item in items])
            return model.answer_ids(batch.take(codes), questions, suite.max_new_tokens, batch.shape)

        shapes = [bucket(max(SHORTEST, n), IMAGE_STEPS) for n in pool.map(length, items)]
        for batch, ids_BT in run_batches(start, batches_by_shape(shapes, batch_size * model.num_data_shards)):
            answers = [model.tokenizer.decode_text(ids_T).strip() for ids_T in ids_BT]
            yield [(items[i], {"answer": text, **more[i]}) for i, text in zip(batch.items, answers)]


def fitted_sizes(size: tuple[int, int], limits: ImageLimits) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) -> the canvas that its image is pasted on, and the size that the canvas is enlarged to."""
    least = math.ceil(max(size) / limits.max_aspect_ratio)
    canvas = max(size[0], least), max(size[1], least)
    scale = max(1.0, limits.min_short_size / min(canvas))
    return canvas, tuple(max(limits.min_short_size, int(side * scale)) for side in canvas)


def fit(image: Image.Image, limits: ImageLimits) -> tuple[Image.Image, bool]:
    """The RGB image as the tokenizer takes it, and whether it had to be changed for that.

    Benchmarks hold images that the released limits refuse, such as a single cropped word: they are padded with white to the most
    elongated shape that is accepted, then enlarged until the short side is.
    """
    canvas, enlarged = fitted_sizes(image.size, limits)
    if image.size == enlarged:
        return image, False
    padded = Image.new("RGB", canvas, "white")
    padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return padded.resize(enlarged, Image.Resampling.BICUBIC), True
