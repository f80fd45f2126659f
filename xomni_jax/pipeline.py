"""The whole model behind one object: `xomni_jax.load(path).generate(...)`."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.components import ModelComponents
from xomni_jax.core.cache import cached_method
from xomni_jax.data.preprocess import preprocess
from xomni_jax.sampling.batches import Batch, batches_by_shape, in_order, run_batches
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, make_decode, to_uint8
from xomni_jax.sampling.generate import make_answerer
from xomni_jax.sampling.keys import NOISE, image_keys, image_orders
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sequence.orders import pieces
from xomni_jax.sequence.padding import IMAGE_STEPS, pad_prompts
from xomni_jax.sequence.tokenizer import encoder_ids, fixed_length_ids
from xomni_jax.tokenizers.protocol import Layout

BATCH_SIZE = 16  # images or answers at a time in each data shard


def check_text(text: str, what: str) -> None:
    """Raises ValueError for a text with bytes that are no UTF-8, as a shell may pass them."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{what} is not valid UTF-8 at character {e.start + 1}; leave that character out") from None


class XOmni(ModelComponents):
    """One X-Omni model on one mesh: text and images in, text and images out. Takes the arguments of `ModelComponents`."""

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of an image's codes, such as (Y, X). Raises ValueError for sizes that are not whole tokens or exceed the model's limits."""
        grid, limits = self.image_tokenizer.layout(height, width).shape, self.preprocess_config
        if max(height, width) > limits.long_size:
            raise ValueError(f"{height}x{width}: the long side may have at most {limits.long_size} pixels with this model")
        if max(height, width) > limits.max_aspect_ratio * min(height, width):
            raise ValueError(f"{height}x{width}: the sides may differ by at most a factor of {limits.max_aspect_ratio:g} with this model")
        return grid

    def sample_codes(
        self,
        prompts: Sequence[str],
        grid: tuple[int, ...],
        keys_PR: jax.Array,
        sampling: SamplingConfig,
        length: int | None = None,
        known: np.ndarray | None = None,
        conditions: Sequence[np.ndarray] = (),
    ) -> dict[str, jax.Array]:
        """R samples of each of P prompts in one batch: {"codes": [P, R, *grid], "logp": [P, R, T] in the order of drawing}.

        Args:
          keys_PR: a sample depends on its own key and prompt, not on the rest of the batch.
          length: tokens that the prompts are padded to; by default the bucket of the longest.
          known: codes [P, *grid] that the samples of a prompt have in common, and -1 where they are drawn.
          conditions: codes [Y, X] of images between every prompt and what is drawn; guidance steers away from the lack of a prompt alone.
        """
        more = dict(conditions=conditions) if conditions else {}
        ids_PS, lengths_P = pad_prompts([self.tokenizer.generation_prompt(p, *grid, **more) for p in prompts], length)
        negative = None
        if sampling.guided:
            before = [self.tokenizer.image_ids(codes) for codes in conditions]
            negative = pad_prompts([np.concatenate([*before, self.tokenizer.image_prefix(*grid)])] * len(prompts))
        (batch,) = self.batches(len(prompts))
        order_PRT, given_PRT = image_orders(self.config("transformer").order, grid, keys_PR, known if known is None else known >= 0), None
        if known is not None:
            given_PRT = np.repeat(known.reshape(len(known), 1, -1), keys_PR.shape[1], axis=1).astype(np.int32)
            given_PRT = given_PRT if order_PRT is None else np.take_along_axis(given_PRT, order_PRT, axis=2)
        *inputs, order_PRT, given_PRT = jax.tree.map(batch.take, (ids_PS, lengths_P, keys_PR, negative, order_PRT, given_PRT))
        with jax.set_mesh(self.mesh):
            sampler = self._sampler(grid, sampling)
            out = batch.cut(sampler(self.params("transformer"), *inputs, order_PRT=order_PRT, given_PRT=given_PRT))
        return {"codes": Layout(grid).unflatten(out["codes"]), "logp": out["logp"]}

    @cached_method
    def _sampler(self, grid: tuple[int, int], sampling: SamplingConfig) -> Sampler:
        made, about = Sampler.make(self.module("transformer"), grid, sampling), (self.config("transformer"), grid, sampling)
        return dataclasses.replace(made, start=self.kept(made.start, "start", about), draw=self.kept(made.draw, "draw", about, donate=2))

    def text_ids(self, prompts: Sequence[str], cfg: DecodeConfig | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The prompts as T5 ids [B, text_length] and CLIP ids [B, pooled_length]."""
        c = cfg or self.decode_config

        def ids(name: str, length: int) -> np.ndarray:
            own = self.encoder_tokenizer(name)
            return fixed_length_ids(self.tokenizer, prompts, length) if own is None else encoder_ids(own, prompts, length)

        return ids("t5", c.text_length), ids("clip", c.pooled_length)

    @property
    def decodes_alone(self) -> bool:
        """Whether the image tokenizer's own decoder makes the pixels, without prompts and noise: the model has no diffusion decoder."""
        return self.image_tokenizer.has_decoder and "mmdit" not in self.description["components"]

    def noise(self, keys_B: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """Starting noise of the decoder, packed: [B, T, C], one key per image; no channels where it takes no noise."""
        shape = (math.prod(grid), 0 if self.decodes_alone else self.config("mmdit").in_channels)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)

    def decode_images(self, codes_BYX: Any, prompts: Sequence[str], noise_BTC: Any, cfg: DecodeConfig | None = None) -> jax.Array:
        """Codes -> uint8 images [B, H, W, 3] on the device, in one batch."""
        if self.decodes_alone:
            return self._tokenizer("pixels", codes_BYX)
        cfg = cfg or self.decode_config
        (batch,) = self.batches(len(codes_BYX))
        with jax.set_mesh(self.mesh):  # the surplus rows are made here, too: the caller may work on another mesh
            rows = map(batch.take, (codes_BYX, *self.text_ids(prompts, cfg), noise_BTC))
            return batch.cut(
                self._decode(cfg)(self.params(self.image_tokenizer.component), self.decoder_params(), *rows, self.text_ids([""], cfg))
            )

    @cached_method
    def _decode(self, cfg: DecodeConfig):
        about = [self.config(name) for name in (self.image_tokenizer.component, *DECODER_COMPONENTS)]
        return self.kept(make_decode(self.image_tokenizer, self.decoder, cfg, self.num_data_shards), "decode", (about, cfg))

    def decode(
        self,
        codes_BYX: Any,
        prompts: Sequence[str] | None = None,
        noise: Any = None,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
        numbers: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """Codes [B, Y, X] -> images, `batch_size` at a time in each data shard.

        Args:
          prompts: one per image; empty ones by default.
          noise: starting noise [B, T, C]; by default drawn from `seed` and the images' `numbers` (0, 1, ...).
        """
        codes_BYX = self.checked(codes_BYX)
        prompts = [""] * len(codes_BYX) if prompts is None else list(prompts)
        if len(prompts) != len(codes_BYX):
            raise ValueError(f"{len(prompts)} prompts for {len(codes_BYX)} images' codes; give one each, or none")
        numbers_B = np.arange(len(codes_BYX)) if numbers is None else np.array(numbers)

        def program(batch: Batch) -> jax.Array:
            keys = functools.partial(image_keys, seed, batch.take(numbers_B), NOISE)
            noise_BTC = self.noise(keys(), codes_BYX.shape[1:]) if noise is None else batch.take(noise)
            return self.decode_images(batch.take(codes_BYX), batch.take(prompts), noise_BTC)

        return [Image.fromarray(x) for x in in_order(run_batches(program, self.batches(len(codes_BYX), batch_size)))]

    def checked(self, codes_BYX: Any) -> np.ndarray:
        """Codes as an int32 array [B, Y, X]. Raises ValueError where they are not codes of this model."""
        codes_BYX = np.asarray(codes_BYX)
        size, axes = self.image_tokenizer.config.codebook_size, self.image_tokenizer.axes.split()
        if codes_BYX.ndim != 1 + len(axes) or not codes_BYX.size or not np.issubdtype(codes_BYX.dtype, np.integer):
            raise ValueError(f"codes must be integers [{', '.join(('B', *axes))}], got {codes_BYX.dtype} {codes_BYX.shape}")
        if codes_BYX.min() < 0 or codes_BYX.max() >= size:
            raise ValueError(
                f"codes must lie within 0..{size - 1}, got {codes_BYX.min()}..{codes_BYX.max()}; take them from this model's encode"
            )
        return codes_BYX.astype(np.int32)

    def generate(self, prompts: str | Sequence[str], *args: Any, **settings: Any) -> list[Image.Image]:
        """One image per prompt. The arguments are those of `draw`."""
        return list(self.draw(prompts, *args, **settings))

    def draw(
        self,
        prompts: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float = 0.03,
        guidance: float = 1.0,
        window: int = 1,
        batch_size: int = BATCH_SIZE,
        decode_batch_size: int = BATCH_SIZE,
        known: np.ndarray | None = None,
        conditions: Sequence[np.ndarray] = (),
    ) -> Iterator[Image.Image]:
        """One image per prompt, each as soon as its batch is drawn. Image i depends on (seed, i) and its prompt alone.

        Args:
          height, width: pixels; by default the model's own size. Another one than it was trained on is drawn with a warning.
          temperature, top_k, top_p, min_p, guidance, window: see `SamplingConfig`; the defaults are the released ones.
          batch_size: prompts at a time in each data shard. decode_batch_size: images decoded to pixels at a time.
          known: codes that stay, from `known_codes`; height and width are then those of that image.
          conditions: codes [Y, X] of images that all are drawn from, from `encode`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompts given; pass at least one")
        size = self.image_size(height, width) if known is None else self.size_of(known.shape)
        grid, trained = self.grid(*size), self.trained_sizes
        if trained and size not in trained:
            sizes = ", ".join(f"{y}x{x}" for y, x in trained)
            warnings.warn(f"{size[0]}x{size[1]}: this model was trained on {sizes}; expect a worse image", stacklevel=2)
        self.check_prompts(prompts)
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, guidance, window)
        image_keys(seed, 1)  # refuses a seed out of range
        return self._drawn(prompts, grid, seed, sampling, batch_size, decode_batch_size, known, conditions)

    def _drawn(
        self,
        prompts: list[str],
        grid: tuple[int, ...],
        seed: int,
        sampling: SamplingConfig,
        batch_size: int,
        decode_batch_size: int,
        known: np.ndarray | None,
        conditions: Sequence[np.ndarray],
    ) -> Iterator[Image.Image]:
        def program(batch: Batch) -> jax.Array:
            keys_P1 = image_keys(seed, batch.take(np.arange(len(prompts))))[:, None]
            given = None if known is None else np.repeat(known[None], len(keys_P1), axis=0)
            return self.sample_codes(batch.take(prompts), grid, keys_P1, sampling, known=given, conditions=conditions)["codes"][:, 0]

        for batch in self.batches(len(prompts), batch_size):
            codes = np.stack(in_order(run_batches(program, [batch])))
            yield from self.decode(codes, [prompts[i] for i in batch.items], None, seed, decode_batch_size, batch.items)

    def known_codes(self, image: Image.Image, mask: Image.Image) -> np.ndarray:
        """The codes of an image, int32 [Y, X], with -1 in the cells that are to be drawn again: those with a pixel of the mask that is
        more white than black.

        Raises ValueError for a mask of another size, or one that leaves nothing to draw. Warns where the model will not see all that stays,
        or has not learned to go on from it.
        """
        if mask.size != image.size:
            (w, h), (x, y) = image.size, mask.size
            raise ValueError(f"the mask has {y}x{x} pixels and the image {h}x{w}; give a mask of the image's size")
        (codes,), white = self.encode([image]), np.asarray(mask.convert("L")) > 127
        rows, columns = (np.arange(n) * cells // n for n, cells in zip(white.shape, codes.shape))
        redrawn = np.zeros(codes.shape, bool)
        np.logical_or.at(redrawn, (rows[:, None], columns), white)
        if not redrawn.any():
            raise ValueError("the mask has no white pixel; paint white what is to be drawn again")
        if self.config("transformer").order == "raster":
            warnings.warn("this model draws row by row: it does not see what stays right of and below the cells it draws", stacklevel=2)
        elif (parts := len(pieces(~redrawn))) > 1:
            warnings.warn(f"what stays has {parts} pieces that do not touch, which no order in training begins with", stacklevel=2)
        return np.where(redrawn, -1, codes)

    def size_of(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) in pixels of an image of Y x X codes."""
        return grid[-2] * self.image_tokenizer.config.patch, grid[-1] * self.image_tokenizer.config.patch

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels of an image, by default the model's own: 1152 x 1152, as released, when it names none."""
        own = self.description.get("settings", {}).get("size", {"height": 1152, "width": 1152})
        return own["height"] if height is None else height, own["width"] if width is None else width

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images that the decoder was trained on; empty where the model does not say."""
        own = self.description.get("settings", {}).get("size", {})
        return [(own["height"], own["width"]), *map(tuple, own["others"])] if "others" in own else []

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for prompts that are empty or longer than the decoder's text encoder takes.

        Encoders with their own tokenizers truncate long prompts, as released; this warns where T5's truncates.
        """
        limit = self.decode_config.text_length - 1  # every row ends with an end or padding token
        own = self.encoder_tokenizer("t5")
        for i, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {i + 1}")
            if not prompt.strip():
                raise ValueError(f"prompt {i + 1} is empty; describe the image")
            n = self.decoder_tokens(prompt)
            if n > limit:
                many = f"prompt {i + 1} ({prompt[:40]!r}...) has {n} tokens, this model's decoder takes {limit}"
                if own is None:
                    raise ValueError(f"{many}; shorten it")
                warnings.warn(f"{many}: its codes are sampled from all of it, and decoded to pixels with its beginning", stacklevel=2)

    def decoder_tokens(self, prompt: str) -> int:
        """Number of a prompt's tokens for the decoder's text encoder, without special tokens."""
        own = self.encoder_tokenizer("t5")
        return len(self.tokenizer.encode_text(prompt) if own is None else own.encode(prompt, add_special_tokens=False, verbose=False))

    def encode_pixels(self, pixels_BHWC: Any) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> codes [B, Y, X] on the device, in one batch."""
        return self._tokenizer("encode", pixels_BHWC)

    def encode_ragged(self, pixels: Sequence[np.ndarray], batch_size: int = 1) -> list[np.ndarray]:
        """Pixels [H, W, 3] of images of any sizes -> codes [Y, X] of each.

        Images of one size share batches of `batch_size` images in each data shard.
        """
        batches = batches_by_shape([p.shape for p in pixels], batch_size * self.num_data_shards)
        return in_order(run_batches(lambda batch: self.encode_pixels(np.stack(batch.take(pixels))), batches))

    def encode(self, images: Sequence[Image.Image | np.ndarray], batch_size: int = 1) -> list[np.ndarray]:
        """Codes [Y, X] of each image at its own resolution, after the released preprocessing."""
        return self.encode_ragged([preprocess(image, self.preprocess_config) for image in images], batch_size)

    def semantics(self, codes_BYX: Any) -> jax.Array:
        """Codes [B, Y, X] -> semantics [B, Y, X, C]."""
        return self._tokenizer("semantics", self.checked(codes_BYX))

    def _tokenizer(self, method: str, x: Any) -> jax.Array:
        """A method of the image tokenizer on rows [B, ...], in one batch; pixels as uint8 images."""
        (batch,) = self.batches(len(x))
        with jax.set_mesh(self.mesh):
            return batch.cut(self._tokenizer_program(method)(self.params(self.image_tokenizer.component), batch.take(x)))

    @cached_method
    def _tokenizer_program(self, method: str):
        run = getattr(self.image_tokenizer, method)
        return jax.jit((lambda params, x: to_uint8(run(params, x))) if method == "pixels" else run)

    def velocity(self, latents_BTC: Any, sigma_B: Any, codes_BYX: Any, prompts: Sequence[str]) -> jax.Array:
        """The MMDiT's velocity [B, T, C] of packed latents at noise levels sigma, for those who bring their own sampler."""
        (batch,) = self.batches(len(codes_BYX))
        rows = map(batch.take, (latents_BTC, sigma_B, *self.text_ids(prompts), self.semantics(codes_BYX)))
        with jax.set_mesh(self.mesh):
            return batch.cut(self._velocity(self.decoder_params(), *map(jnp.asarray, rows)))

    @functools.cached_property
    def _velocity(self):
        decoder = self.decoder

        def velocity(params, latents_BTC, sigma_B, text_BS, pooled_BS, semantics_BYXD):
            cond = decoder.condition(params, text_BS, pooled_BS, semantics_BYXD)
            return decoder.velocity(params, latents_BTC, sigma_B, cond, semantics_BYXD.shape[1:3])

        return jax.jit(velocity)

    def logits(self, ids_BL: Any, mode: str = "text") -> jax.Array:
        """Logits [B, L, text + multimodal ids]; ids that the mode cannot produce are at the dtype's minimum.

        Args:
          mode: "text" scores the text ids with the text head, "image" the image codes with the image head.
        """
        if mode not in ("text", "image"):
            raise ValueError(f"mode={mode!r} is unknown; use text or image")
        c = self.config("transformer")
        hidden_BLD = self._run("transformer", None, np.asarray(ids_BL))
        part = self._run("transformer", f"{mode}_logits", hidden_BLD)
        before = 0 if mode == "text" else c.vocab_size
        after = c.total_vocab_size - before - part.shape[-1]
        return jnp.pad(part, ((0, 0), (0, 0), (before, after)), constant_values=float(jnp.finfo(part.dtype).min))

    def _run(self, name: str, method: str | None, x: Any) -> jax.Array:
        """A component's method on rows [B, ...], in one batch."""
        (batch,) = self.batches(len(x))
        with jax.set_mesh(self.mesh):
            return batch.cut(self._method(name, method)(self.params(name), batch.take(x)))

    @cached_method
    def _method(self, name: str, method: str | None):
        module = self.module(name)
        return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))

    def chat(self, image: Image.Image | np.ndarray, question: str, max_tokens: int = 512) -> str:
        """Answers a question about an image, greedily, until the end of the turn or `max_tokens` (512 as released)."""
        if not question.strip():
            raise ValueError("the question is empty; ask something about the image")
        check_text(question, "the question")
        limit, length = self.tokenizer.text.model_max_length, len(self.tokenizer.encode_text(question))
        if not 1 <= max_tokens <= limit:
            raise ValueError(f"an answer of {max_tokens} tokens is not possible; this model's tokenizer allows 1 to {limit}")
        if length + max_tokens > limit:
            most = f"beside an answer of {max_tokens} this model's tokenizer allows {limit - max_tokens}"
            raise ValueError(f"the question has {length} tokens, {most}; shorten it")
        return self.answer(self.encode([image]), [question], max_tokens)[0]

    def answer(
        self, codes: Sequence[np.ndarray], questions: Sequence[str], max_tokens: int = 512, batch_size: int = BATCH_SIZE
    ) -> list[str]:
        """Greedy answers to one question per image, given its codes [Y, X]; `batch_size` at a time in each data shard."""

        def program(batch: Batch) -> jax.Array:
            return self.answer_ids(batch.take(codes), batch.take(questions), max_tokens)

        ids = in_order(run_batches(program, self.batches(len(codes), batch_size)))
        return [self.tokenizer.decode_text(ids_T).strip() for ids_T in ids]

    def answer_ids(
        self, codes: Sequence[np.ndarray], questions: Sequence[str], max_tokens: int = 512, length: int | None = None
    ) -> jax.Array:
        """Greedy answers in one batch: ids [B, max_tokens], each closed by the end of turn where it fits, then padding.

        Args:
          length: tokens that the prompts are padded to; by default the bucket of the longest.
        """
        prompts = [self.tokenizer.understanding_prompt(c, q) for c, q in zip(codes, questions, strict=True)]
        (batch,) = self.batches(len(prompts))
        ids_PS, lengths_P = map(batch.take, pad_prompts(prompts, length, IMAGE_STEPS))
        with jax.set_mesh(self.mesh):
            return batch.cut(self._answerer(max_tokens)(self.params("transformer"), ids_PS, lengths_P))

    @cached_method
    def _answerer(self, max_tokens: int):
        about = self.config("transformer"), max_tokens, self.tokenizer.end_of_turn, self.tokenizer.pad
        return self.kept(make_answerer(self.module("transformer"), *about[1:]), "answer", about)
