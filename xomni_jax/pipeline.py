"""The whole model behind one object: `xomni_jax.load(path).generate(...)`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.components import ModelParts
from xomni_jax.data.preprocess import preprocess
from xomni_jax.sampling.decode import make_answerer
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sampling.pixels import make_decode
from xomni_jax.sampling.sampler import Sampler
from xomni_jax.sequence.padding import PROMPT_BUCKET, pad_prompts
from xomni_jax.sequence.tokenizer import encoder_ids, fixed_length_ids
from xomni_jax.sharding.arrays import whole


class XOmni(ModelParts):
    """One X-Omni model on one mesh: text and images in, text and images out. Its arguments are those of `ModelParts`."""

    # ---- text to image ----
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of an image size; refuses sizes that are not whole tokens or leave the preprocessing limits."""
        p, limits = self.patch, self.preprocess_config
        if height < p or width < p or height % p or width % p:
            near = f"{max(p, round(height / p) * p)}x{max(p, round(width / p) * p)}"
            raise ValueError(f"{height}x{width} pixels are not whole {p}x{p} tokens; the nearest size that is: {near}")
        if max(height, width) > limits.long_size:
            raise ValueError(f"{height}x{width}: the long side may have at most {limits.long_size} pixels with this model")
        if max(height, width) > limits.max_aspect_ratio * min(height, width):
            raise ValueError(f"{height}x{width}: the sides may differ by at most a factor of {limits.max_aspect_ratio:g} with this model")
        return height // p, width // p

    def sample_codes(
        self, prompts: Sequence[str], grid: tuple[int, int], keys_PR: jax.Array, sampling: SamplingConfig, multiple: int = PROMPT_BUCKET
    ) -> dict[str, jax.Array]:
        """R samples of every prompt: {"codes": [P, R, Y, X], "logp": [P, R, T]}; the row of keys decides a sample, not its batch."""
        ids_PS, lengths_P = pad_prompts([self.tokenizer.generation_prompt(p, *grid) for p in prompts], multiple)
        negative = None
        if sampling.guidance != 1.0:
            negative = pad_prompts([self.tokenizer.negative_prompt(*grid)] * len(prompts))
        P = len(prompts)
        ids_PS, lengths_P, keys_PR = self.fill(ids_PS), self.fill(lengths_P), self.fill(keys_PR)
        negative = negative and tuple(map(self.fill, negative))
        with jax.set_mesh(self.mesh):
            out = self._sampler(grid[0] * grid[1], sampling)(self.params("transformer"), ids_PS, lengths_P, keys_PR, negative)
        R = keys_PR.shape[1]
        return {"codes": out["codes"][:P].reshape(P, R, *grid), "logp": out["logp"][:P]}

    @functools.cache
    def _sampler(self, n_codes: int, sampling: SamplingConfig) -> Sampler:
        return Sampler.make(self.module("transformer"), n_codes, sampling)

    def text_ids(self, prompts: Sequence[str], cfg: DecodeConfig | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The prompts as T5 ids [B, S] and CLIP ids [B, S'], at the decoder's fixed lengths."""
        c = cfg or self.decode_config

        def ids(name: str, length: int) -> np.ndarray:
            own = self.encoder_tokenizer(name)
            return fixed_length_ids(self.tokenizer, prompts, length) if own is None else encoder_ids(own, prompts, length)

        return ids("t5", c.text_length), ids("clip", c.pooled_length)

    def noise(self, keys_B: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Packed starting noise [B, T, C], one key an image."""
        shape = (grid[0] * grid[1], self.config("mmdit").in_channels)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)

    def decode_images(self, codes_BYX: Any, prompts: Sequence[str], noise_BTC: Any, cfg: DecodeConfig | None = None) -> jax.Array:
        """Codes -> uint8 images [B, H, W, 3] on the device."""
        cfg = cfg or self.decode_config
        with jax.set_mesh(self.mesh):  # in which the rows are made, too: a caller may work on another
            rows = tuple(map(self.fill, (codes_BYX, *self.text_ids(prompts, cfg), noise_BTC)))
            images = self._decode(cfg)(self.params("siglip_vq"), self.decoder_params(), *rows, self.text_ids([""], cfg))
        return images if len(images) == len(codes_BYX) else images[: len(codes_BYX)]

    @functools.cache
    def _decode(self, cfg: DecodeConfig):
        return make_decode(self.module("siglip_vq"), self.decoder, cfg, self.ways)

    def decode(self, codes_BYX: Any, prompts: Sequence[str] | None = None, noise: Any = None, seed: int = 0) -> list[Image.Image]:
        """Codes [B, Y, X] -> images. Without `noise` [B, T, C] it is drawn from `seed`; without prompts they are empty."""
        codes_BYX = self.checked(codes_BYX)
        prompts = [""] * len(codes_BYX) if prompts is None else list(prompts)
        if len(prompts) != len(codes_BYX):
            raise ValueError(f"{len(prompts)} prompts for {len(codes_BYX)} images' codes; give one each, or none")
        if noise is None:
            noise = self.noise(image_keys(seed, len(codes_BYX), NOISE), codes_BYX.shape[1:])
        images = self.decode_images(codes_BYX, prompts, noise)
        return [Image.fromarray(image) for image in np.asarray(images)]

    def checked(self, codes_BYX: Any) -> np.ndarray:
        """Codes as an int32 array [B, Y, X]. ValueError when they are no codes of this model's tokenizer."""
        codes_BYX = np.asarray(codes_BYX)
        size = self.config("siglip_vq").codebook_size
        if codes_BYX.ndim != 3 or not codes_BYX.size or not np.issubdtype(codes_BYX.dtype, np.integer):
            raise ValueError(f"codes must be integers [B, Y, X], got {codes_BYX.dtype} {codes_BYX.shape}")
        if codes_BYX.min() < 0 or codes_BYX.max() >= size:
            raise ValueError(
                f"codes must lie within 0..{size - 1}, got {codes_BYX.min()}..{codes_BYX.max()}; take them from this model's encode"
            )
        return codes_BYX.astype(np.int32)

    def generate(
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
    ) -> list[Image.Image]:
        """One image per prompt. The defaults are the released ones; image i depends on (seed, i) and its prompt alone.

        Args:
          height, width: pixels; the model's own default size without them (1152 x 1152, as released, when it names none).
          temperature: 0 takes the likeliest code. top_k: 0 is off. guidance: of the AR part; 1 is off.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompts given; pass at least one")
        size = self.description.get("settings", {}).get("size", {})
        grid = self.grid(size.get("height", 1152) if height is None else height, size.get("width", 1152) if width is None else width)
        self.check_prompts(prompts)
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, guidance)
        codes = self.sample_codes(prompts, grid, image_keys(seed, len(prompts))[:, None], sampling)["codes"][:, 0]
        return self.decode(codes, prompts, seed=seed)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuses prompts that are empty or longer than the decoder's text encoder takes.

        An encoder with its own tokenizer reads the beginning of a long prompt, as released: T5 with a warning, CLIP as a matter of course.
        """
        limit = self.decode_config.text_length - 1  # an end or padding token closes every row
        own = self.encoder_tokenizer("t5")
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i + 1} is empty; describe the image")
            n = self.decoder_tokens(prompt)
            if n > limit:
                many = f"prompt {i + 1} ({prompt[:40]!r}...) has {n} tokens, this model's decoder takes {limit}"
                if own is None:
                    raise ValueError(f"{many}; shorten it")
                warnings.warn(f"{many}: it is drawn whole, and decoded to pixels from its beginning", stacklevel=2)

    def decoder_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as the decoder's text encoder counts them, without its specials."""
        own = self.encoder_tokenizer("t5")
        return len(self.tokenizer.encode_text(prompt) if own is None else own.encode(prompt, add_special_tokens=False, verbose=False))

    # ---- image to codes, codes to text ----
    def encode_pixels(self, pixels_BHWC: Any) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> codes [B, Y, X]."""
        with jax.set_mesh(self.mesh):
            return self._method("siglip_vq", "encode")(self.params("siglip_vq"), self.fill(pixels_BHWC))[: len(pixels_BHWC)]

    def encode(self, images: Sequence[Image.Image | np.ndarray]) -> list[np.ndarray]:
        """Codes [Y, X] of each image after the released preprocessing, at its own resolution."""
        return [np.asarray(self.encode_pixels(preprocess(image, self.preprocess_config)[None])[0]) for image in images]

    def semantics(self, codes_BYX: Any) -> jax.Array:
        """Codes [B, Y, X] -> semantics [B, Y, X, C]."""
        codes_BYX = self.checked(codes_BYX)
        with jax.set_mesh(self.mesh):
            return self._method("siglip_vq", "semantics")(self.params("siglip_vq"), self.fill(codes_BYX))[: len(codes_BYX)]

    def velocity(self, latents_BTC, sigma_B, codes_BYX, prompts: Sequence[str]) -> jax.Array:
        """The MMDiT's velocity for packed latents, for those who bring their own sampler."""
        codes_BYX = self.checked(codes_BYX)
        rows = tuple(map(self.fill, (latents_BTC, sigma_B, *self.text_ids(prompts), self.semantics(codes_BYX))))
        with jax.set_mesh(self.mesh):
            return self._velocity(self.decoder_params(), *rows)[: len(codes_BYX)]

    @functools.cached_property
    def _velocity(self):
        def velocity(params, latents_BTC, sigma_B, text_BS, pooled_BS, semantics_BYXD):
            cond = self.decoder.condition(params, text_BS, pooled_BS, semantics_BYXD)
            return self.decoder.velocity(params, latents_BTC, sigma_B, cond, semantics_BYXD.shape[1:3])

        return jax.jit(velocity)

    def logits(self, ids_BL: Any, mode: str = "text") -> jax.Array:
        """Logits [B, L, text + multimodal ids]; ids that the mode cannot produce are at the dtype's minimum.

        Args:
          mode: "text" scores the text ids with the text head, "image" the image codes with the image head.
        """
        if mode not in ("text", "image"):
            raise ValueError(f"mode={mode!r} is unknown; use text or image")
        c = self.config("transformer")
        with jax.set_mesh(self.mesh):
            hidden = self._method("transformer")(self.params("transformer"), self.fill(ids_BL))[: len(ids_BL)]
            part = self._method("transformer", f"{mode}_logits")(self.params("transformer"), hidden)
        before = 0 if mode == "text" else c.vocab_size
        after = c.total_vocab_size - before - part.shape[-1]
        return jnp.pad(part, ((0, 0), (0, 0), (before, after)), constant_values=float(jnp.finfo(part.dtype).min))

    @functools.cache
    def _method(self, name: str, method: str | None = None):
        module = self.module(name)
        return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method))

    def chat(self, image: Image.Image | np.ndarray, question: str, max_tokens: int = 512) -> str:
        """Answers a question about an image, greedily, until the end of the turn or `max_tokens` (512 as released)."""
        if not question.strip():
            raise ValueError("the question is empty; ask something about the image")
        return self.answer([self.encode([image])[0]], [question], max_tokens)[0]

    def answer(
        self, codes: Sequence[np.ndarray], questions: Sequence[str], max_tokens: int = 512, multiple: int = PROMPT_BUCKET
    ) -> list[str]:
        """Greedy answers to one question per image, given its codes [Y, X]; prompts are padded to a multiple of `multiple`."""
        return [self.tokenizer.decode_text(ids).strip() for ids in self.answer_ids(codes, questions, max_tokens, multiple)]

    def answer_ids(
        self, codes: Sequence[np.ndarray], questions: Sequence[str], max_tokens: int = 512, multiple: int = PROMPT_BUCKET
    ) -> np.ndarray:
        """The answers' ids [B, max_tokens], each closed by the end of turn where it fits, then padding."""
        prompts = [self.tokenizer.understanding_prompt(c, q) for c, q in zip(codes, questions, strict=True)]
        ids_PS, lengths_P = map(self.fill, pad_prompts(prompts, multiple))
        with jax.set_mesh(self.mesh):
            return whole(self._answerer(max_tokens)(self.params("transformer"), ids_PS, lengths_P))[: len(prompts)]

    @functools.cache
    def _answerer(self, max_tokens: int):
        return make_answerer(self.module("transformer"), max_tokens, self.tokenizer.end_of_turn, self.tokenizer.pad)
