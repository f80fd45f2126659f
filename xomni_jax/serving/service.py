"""What a service can do, for the routes that tell it to: draw, answer, encode, decode, measure entropy."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.checkpoint.store import fingerprint
from xomni_jax.core.http import Refusal
from xomni_jax.data.preprocess import preprocess, to_pixels
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.engine import Engine
from xomni_jax.sampling.keys import NOISE, image_keys, image_orders
from xomni_jax.sampling.logits import SamplingConfig, TracedSampling
from xomni_jax.sampling.segments import Segment, image_spec
from xomni_jax.sequence.padding import IMAGE_STEPS, bucket
from xomni_jax.serving.options import ServeOptions
from xomni_jax.serving.scheduler import Job, Row, Scheduler
from xomni_jax.serving.slots import image_slots, row_counts, text_slots

_GREY = 128  # of pixels whose codes are not drawn yet
_ENCODERS = 32  # sizes of uploads whose programs are kept


@dataclass(frozen=True)
class Drawn:
    """An image, or what is to be seen of it so far.

    Attributes:
      index: of the request's images. image: RGB. partial: number of the partial image; -1: it is complete.
      codes_YX, logp_YX: of a complete image, and the log-probability each code was drawn with.
    """

    index: int
    image: Image.Image
    partial: int = -1
    codes_YX: np.ndarray | None = None
    logp_YX: np.ndarray | None = None


@dataclass(eq=False)
class _Picture:
    """Codes that are to be decoded in this round, those of them that are known so far, and their log-probabilities."""

    row: Row
    codes_YX: np.ndarray
    known_YX: np.ndarray
    logp_YX: np.ndarray
    prompt: str
    noise_key: Any
    partial: int
    tell: Callable[[Drawn], None]


class ServedModel:
    """One model of a service: its sizes, prompts and programs.

    Args:
      name: under which requests ask for it. sizes: (height, width) that it draws; () for those it was trained on, or its own.
    """

    def __init__(self, name: str, model: XOmni, options: ServeOptions, sizes: Sequence[tuple[int, int]] = ()):
        self.name, self.model, self.options = name, model, options
        own = model.image_size()
        self.sizes = list(dict.fromkeys([*sizes] or [own, *model.trained_sizes]))
        for size in self.sizes:
            model.grid(*size)
        self.default = own if own in self.sizes else self.sizes[0]
        # An encoder with a tokenizer of its own truncates, as released; the other has room for so many.
        most = [options.max_prompt_tokens, *([] if model.encoder_tokenizer("t5") else [model.decode_config.text_length - 1])]
        self.prompt_tokens = min(most)
        self._encoders: OrderedDict[tuple[int, ...], Callable[..., Any]] = OrderedDict()
        self.batch_sizes = row_counts(options.slots, model.num_data_shards)
        if options.slots % model.num_data_shards:
            raise ValueError(
                f"--slots {options.slots} does not divide over {model.num_data_shards} data shards; make it a multiple of them"
            )

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the weights that images depend on."""
        m = self.model
        parts = [fingerprint(name, m.params(name), m.config(name)) for name in sorted(m.description["components"])]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def nearest(self, height: int, width: int) -> list[tuple[int, int]]:
        """The served sizes, those most alike in shape and area first."""
        unlike = lambda size: abs(math.log(size[0] / height)) + abs(math.log(size[1] / width))
        return sorted(self.sizes, key=unlike)

    def check_prompt(self, prompt: str) -> None:
        """Raises ValueError where the model cannot take a prompt."""
        self.model.check_prompts([prompt])
        count = len(self.model.tokenizer.encode_text(prompt))
        if count > self.prompt_tokens:
            raise ValueError(f"the prompt has {count} tokens, this service takes {self.prompt_tokens}; shorten it")

    def image_job(
        self,
        prompt: str,
        size: tuple[int, int],
        seed: int,
        numbers: Sequence[int],
        sampling: SamplingConfig,
        known_YX: np.ndarray | None = None,
        **told: Any,
    ) -> Job:
        """The job of images `numbers` of a seed. `known_YX`: codes that they have in common, -1 elsewhere."""
        self.check_prompt(prompt)
        grid, tokenizer, o = self.model.grid(*size), self.model.tokenizer, self.options
        prefix = tokenizer.image_prefix(*grid)
        length, shape = bucket(self.prompt_tokens + len(prefix)), TracedSampling.of(sampling)
        segment = max(1, min(o.segment, grid[0] * grid[1] // 4))
        known_YX = np.full(grid, -1) if known_YX is None else known_YX
        keys = image_keys(seed, np.array(numbers))
        plans = [{"given": known_YX.ravel().astype(np.int32)}] * len(numbers)
        if (order_PRT := image_orders(self.model.config("transformer").order, grid, keys[None], known_YX[None] >= 0)) is not None:
            plans = [{"given": plan["given"][order_T], "order": order_T} for plan, order_T in zip(plans, order_PRT[0])]
        return Job(
            ("images", self.name, grid, shape.guided, shape.nucleus),
            lambda: image_slots(self.model, grid, shape, o.slots, length, segment),
            tokenizer.generation_prompt(prompt, *grid),
            prefix if shape.guided else None,
            np.asarray(jax.random.key_data(keys)),
            sampling,
            grid[0] * grid[1],
            -1,
            deadline=time.monotonic() + o.deadline_seconds,
            plans=plans,
            **told,
        )

    def text_job(self, turns: Sequence[Any], max_tokens: int, seed: int, sampling: SamplingConfig, **told: Any) -> Job:
        """The job of an answer to a conversation whose images are codes [Y, X]."""
        tokenizer, o = self.model.tokenizer, self.options
        words = sum(len(tokenizer.encode_text(part)) for _, content in turns for part in content if isinstance(part, str))
        if words > o.max_prompt_tokens:
            raise ValueError(f"the conversation has {words} tokens of text, this service takes {o.max_prompt_tokens}; shorten it")
        ids = tokenizer.conversation_prompt(turns)
        length, limit = bucket(len(ids), IMAGE_STEPS), min(o.max_answer_tokens, tokenizer.text.model_max_length)
        segment, shape = min(8, limit), TracedSampling.of(sampling)
        return Job(
            ("answers", self.name, length, shape.nucleus),
            lambda: text_slots(self.model, limit, shape, o.slots, length, segment),
            ids,
            None,
            np.asarray(jax.random.key_data(image_keys(seed, 1))),
            sampling,
            max_tokens,
            tokenizer.end_of_turn,
            deadline=time.monotonic() + o.deadline_seconds,
            **told,
        )

    # ---- in the scheduler's thread ----
    def encode(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """Codes [Y, X] of an image after the released preprocessing, or stretched to a size."""
        if size is None:
            pixels = preprocess(image, self.model.preprocess_config)
        else:
            pixels = to_pixels(np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)))
        return np.asarray(self._encoder(pixels.shape)(self.model.params("siglip_vq"), pixels[None]))[0]

    def _encoder(self, shape: tuple[int, ...]) -> Callable[..., Any]:
        """The program of a size; uploads may have any, so that old ones go."""
        if shape not in self._encoders:
            module = self.model.module("siglip_vq")
            self._encoders[shape] = jax.jit(lambda params, x: module.apply({"params": params}, x, method="encode"))
            while len(self._encoders) > _ENCODERS:
                self._encoders.popitem(last=False)
        self._encoders.move_to_end(shape)
        return self._encoders[shape]

    def decode(self, pictures: Sequence[_Picture]) -> list[Image.Image]:
        """Images of codes of one size, in the largest batches that they fill: rows that only fill a batch cost as much as images."""
        images: list[Image.Image] = []
        while left := pictures[len(images) :]:
            size = next((size for size in reversed(self.batch_sizes) if size <= len(left)), self.batch_sizes[0])
            part = [*left[:size], *left[:1] * (size - len(left))]
            codes_BYX = np.stack([p.codes_YX for p in part])
            noise_BTC = self.model.noise(jnp.stack([p.noise_key for p in part]), codes_BYX.shape[1:])
            images += self.model.decode(codes_BYX, [p.prompt for p in part], noise_BTC, batch_size=size)[: len(left)]
        return images

    def entropy(self, prompt: str, codes_YX: np.ndarray) -> np.ndarray:
        """Entropy [Y, X] in nats of the model's distribution of each code, given the prompt and the codes before it."""
        ids_S = np.zeros((1, bucket(self.prompt_tokens + 16)), np.int32)
        ids = self.model.tokenizer.generation_prompt(prompt, *codes_YX.shape)
        ids_S[0, : len(ids)] = ids
        inputs = ids_S, np.array([len(ids)], np.int32), codes_YX.reshape(1, -1)
        return np.asarray(self._entropy(self.model.params("transformer"), *inputs)).reshape(codes_YX.shape)

    @functools.cached_property
    def _entropy(self) -> Callable[..., Any]:
        engine, plain = Engine(self.model.module("transformer")), SamplingConfig(top_k=0, min_p=0.0)

        def entropy(params, ids_BS, lengths_B, codes_BT):
            image = Segment(codes_BT, kind="image", spec=image_spec(codes_BT.shape[1], plain))
            return engine.score(params, (ids_BS, lengths_B), (image,))[0][1]

        return jax.jit(entropy)


@dataclass
class Service:
    """Models behind one scheduler.

    Attributes:
      models: by name; the first is the one of requests that name none.
    """

    models: Mapping[str, ServedModel]
    options: ServeOptions
    _pictures: list[tuple[ServedModel, _Picture]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.options.max_queue, self.options.max_lanes, self._decode)

    def _decode(self) -> None:
        """Decodes what a round of segments has completed or is to show, one batch per model and size."""
        groups = defaultdict(list)
        for served, picture in self._pictures:
            if not picture.row.job.cancelled:
                groups[served.name, picture.codes_YX.shape].append((served, picture))
        self._pictures.clear()
        for group in groups.values():
            served, pictures = group[0][0], [picture for _, picture in group]
            try:
                images = served.decode(pictures)
            except Exception as error:  # noqa: BLE001 - such as no memory
                print(f"xomni serve: decoder of {served.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                for job in {picture.row.job for picture in pictures}:
                    job.cancelled = True
                    job.failed(500, "the image could not be decoded; the service's log says why")
                continue
            for picture, image in zip(pictures, images):
                index, partial = picture.row.index, picture.partial
                if partial < 0:
                    picture.tell(Drawn(index, image, partial, picture.codes_YX, picture.logp_YX))
                else:
                    picture.tell(Drawn(index, _veiled(image, picture.known_YX, served.model.patch), partial))

    async def draw(
        self,
        served: ServedModel,
        prompt: str,
        size: tuple[int, int],
        seed: int,
        numbers: Sequence[int],
        sampling: SamplingConfig,
        partials: int = 0,
        known_YX: np.ndarray | None = None,
    ) -> AsyncIterator[Drawn]:
        """The images `numbers` of a seed as they are completed, each after `partials` partial ones. Refusal when it cannot go on.

        Args:
          known_YX: codes that all of them have in common, -1 elsewhere.
        """
        grid, noise_keys = served.model.grid(*size), image_keys(seed, np.array(numbers), NOISE)
        n_codes, before_YX = grid[0] * grid[1], np.full(grid, -1) if known_YX is None else known_YX
        with self._events() as (events, tell, failed):

            def advanced(row: Row, complete: bool) -> None:
                done = len(row.tokens)
                due = done * (partials + 1) // n_codes
                if complete or due > shown[row.index]:
                    shown[row.index] = due
                    codes, known, logp = before_YX.clip(0), before_YX >= 0, np.zeros(grid, np.float32)
                    cells = np.unravel_index(job.plans[row.index].get("order", np.arange(n_codes))[:done], grid)
                    codes[cells], known[cells], logp[cells] = row.tokens, True, row.logp
                    made = _Picture(row, codes, known, logp, prompt, noise_keys[row.index], -1 if complete else due - 1, tell)
                    self._pictures.append((served, made))

            shown = [0] * len(numbers)
            job = served.image_job(prompt, size, seed, numbers, sampling, known_YX, advanced=advanced, failed=failed)
            self.scheduler.submit(job)
            try:
                left = job.count
                while left:
                    drawn = await _next(events)
                    left -= drawn.partial < 0
                    yield drawn
            finally:
                job.cancelled = True

    async def answer(
        self, served: ServedModel, turns: Sequence[Any], max_tokens: int, seed: int, sampling: SamplingConfig
    ) -> AsyncIterator[tuple[str, int, bool]]:
        """(new text, tokens so far, whether the model ended its turn) of an answer; images of the turns are encoded first."""
        codes = [
            (role, [await self.encode(served, part) if isinstance(part, Image.Image) else part for part in content])
            for role, content in turns
        ]
        with self._events() as (events, tell, failed):
            job = served.text_job(
                codes, max_tokens, seed, sampling, advanced=lambda row, done: tell((list(row.tokens), done)), failed=failed
            )
            self.scheduler.submit(job)
            told, complete = "", False
            try:
                while not complete:
                    tokens, complete = await _next(events)
                    text = served.model.tokenizer.decode_text(tokens).lstrip()
                    # Before the end, without what may change: part of a character, blanks that may be the last.
                    text = text.rstrip() if complete else text.rstrip("\ufffd \n\t")
                    new, told = text[len(told) :], text if len(text) > len(told) else told
                    yield new, len(tokens), complete and tokens[-1] == job.stop
            finally:
                job.cancelled = True

    async def encode(self, served: ServedModel, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """Codes [Y, X] of an image."""
        return await asyncio.wrap_future(self.scheduler.call(lambda: served.encode(image, size)))

    async def known_codes(self, served: ServedModel, image: Image.Image, mask: Image.Image) -> np.ndarray:
        """See `XOmni.known_codes`."""
        return await asyncio.wrap_future(self.scheduler.call(lambda: served.model.known_codes(image, mask)))

    async def decode(self, served: ServedModel, codes_YX: np.ndarray, prompt: str, seed: int) -> Image.Image:
        """The image of codes."""
        decode = lambda: served.model.decode(codes_YX[None], [prompt], seed=seed)[0]
        return await asyncio.wrap_future(self.scheduler.call(decode))

    async def entropy(self, served: ServedModel, prompt: str, codes_YX: np.ndarray) -> np.ndarray:
        """See `ServedModel.entropy`."""
        return await asyncio.wrap_future(self.scheduler.call(lambda: served.entropy(prompt, codes_YX)))

    def warm(self) -> None:
        """Loads the models and compiles what a request of each model's own size needs."""

        async def one(served: ServedModel) -> None:
            for count in served.batch_sizes:
                async for _ in self.draw(served, "a", served.default, 0, range(count), SamplingConfig()):
                    pass

        for served in self.models.values():
            asyncio.run(one(served))
            self.scheduler.call(lambda served=served: served.hash).result()

    @contextmanager
    def _events(self) -> Iterator[tuple[asyncio.Queue, Callable[[Any], None], Callable[[int, str], None]]]:
        """A queue of this event loop, and what puts an event or a failure into it from another thread."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        yield events, tell, lambda status, sentence: tell(Refusal(status, sentence, 0))


async def _next(events: asyncio.Queue) -> Any:
    event = await events.get()
    if isinstance(event, Refusal):
        raise event
    return event


def _veiled(image: Image.Image, known_YX: np.ndarray, patch: int) -> Image.Image:
    """An image with grey in place of codes that are not known yet."""
    pixels = np.array(image)
    pixels[~known_YX.repeat(patch, 0).repeat(patch, 1)] = _GREY
    return Image.fromarray(pixels)
