"""The whole model behind one object: `xomni_jax.load(path).generate(...)`. Parts load when first used."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from PIL import Image

from xomni_jax.checkpoint.released_model import ReleasedModel, is_released
from xomni_jax.checkpoint.store import CheckpointError, config_from_json, load_component, read_model_json
from xomni_jax.data.preprocess import ImageLimits, preprocess
from xomni_jax.models.int8 import quantize
from xomni_jax.models.registry import COMPONENTS, init_params
from xomni_jax.sampling.decode import generate_codes, generate_text
from xomni_jax.sampling.decoder import DecodeConfig, Decoder, to_uint8
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sequence.tokenizer import MultimodalTokenizer, encoder_ids, fixed_length_ids, read_tokenizer
from xomni_jax.sharding.arrays import whole
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import RULES, constrain, param_shardings

DECODER_PARTS = ("mmdit", "t5", "clip", "autoencoder")
PROMPT_BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths are compiled
NOISE = 1  # purpose of the decoder's key, beside the sampler's


def load(path: str | Path, mesh: Mesh | None = None, dtype: Any = None, flux: str | Path | None = None) -> XOmni:
    """Opens a model directory. Nothing but its description is read yet; a missing part is an error when it is used.

    Args:
      path: a model directory (it holds model.json), or a released PyTorch directory as it was downloaded, converted on the fly.
      mesh: where the parameters go; one device without it.
      dtype: casts every parameter; None keeps what is stored.
      flux: the directory of FLUX.1-dev, beside a released directory: the VAE and text encoders are there.
    """
    return XOmni(path, mesh, dtype, flux)


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int = PROMPT_BUCKET) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads id lists to one bucketed length: (ids [P, S] int32, lengths [P] int32)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), -(-int(lengths.max()) // multiple) * multiple), np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    return ids, lengths


def make_decode(vq: nn.Module, decoder: Decoder, cfg: DecodeConfig, ways: int) -> Callable[..., jax.Array]:
    """The jitted decoder (tokenizer's parameters, decoder's, codes [B, Y, X], T5 ids, CLIP ids, noise, empty prompt's ids) -> uint8 images.

    `ways`: over how many devices rows are split.
    """

    def decode(vq_params, params, codes_BYX, text_BS, pooled_BS, noise_BTC, empty):
        semantics = vq.apply({"params": vq_params}, codes_BYX, method="semantics")
        # The two rows of the empty prompt are repeated, so that they too split over a mesh.
        empty = tuple(jnp.repeat(x, ways, axis=0) for x in empty)
        images = to_uint8(decoder.decode(params, semantics, text_BS, pooled_BS, empty, noise_BTC, cfg))
        return constrain(images, "batch", None, None, None, name="pictures")  # each host takes its own

    return jax.jit(decode)


class XOmni:
    """One X-Omni model on one mesh: text and pictures in, text and pictures out."""

    def __init__(self, path: str | Path, mesh: Mesh | None = None, dtype: Any = None, flux: str | Path | None = None):
        self.path, self.dtype, self._flux = Path(path), dtype, flux
        self.mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
        self.released = ReleasedModel(path, flux) if is_released(path) else None
        if flux is not None and self.released is None:
            raise CheckpointError(f"{path}: is a model directory, which has its own VAE and text encoders; leave flux out")
        self.description = read_model_json(path) if self.released is None else self.released.description
        self.ways = int(np.prod([self.mesh.shape[a] for a in RULES["batch"]]))
        self._params: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}

    def on(self, mesh: Mesh) -> XOmni:
        """The same model on another mesh, with parameters of its own."""
        other = XOmni(self.path, mesh, self.dtype, self._flux)
        other._configs = dict(self._configs)
        return other

    # ---- parts ----
    def config(self, name: str) -> Any:
        """Config dataclass of a component. Raises CheckpointError when the directory lacks it."""
        if name in self._configs:
            return self._configs[name]
        described = self.description["components"].get(name)
        if described is None and self.released and name in self.released.errors:
            raise CheckpointError(self.released.errors[name])
        if described is None:
            have = ", ".join(sorted(self.description["components"])) or "nothing"
            raise CheckpointError(f"{self.path}: this model has no {name} (it has {have}); train that stage, or use a complete model")
        return config_from_json(COMPONENTS[name].config, described["config"], f"{self.path}/model.json")

    @functools.cache
    def module(self, name: str) -> nn.Module:
        """The linen module of a component."""
        return COMPONENTS[name].module(self.config(name))

    def params(self, name: str) -> Any:
        """Parameters of a component, sharded over the mesh; restored once."""
        if name not in self._params:
            self._params[name] = self._restore(name, self.config(name))
        return self._params[name]

    def _restore(self, name: str, cfg: Any) -> Any:
        boxed = jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(0)))
        shardings = param_shardings(boxed, self.mesh)
        if getattr(cfg, "int8", False):
            stored = self._restore(name, dataclasses.replace(cfg, int8=False))
            return jax.jit(lambda params: quantize(params, boxed), out_shardings=shardings)(stored)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings)
        read = functools.partial(load_component, self.path) if self.released is None else self.released.load
        # A run that chose its own way of computing (`set_config`) chose the number format too.
        dtype = cfg.param_dtype if self.dtype is None and name in self._configs else self.dtype
        return read(name, wanted, dtype) if jax.tree.leaves(wanted) else {}

    def release(self, name: str) -> None:
        """Forgets a component's parameters; they are restored when they are asked for again."""
        self._params.pop(name, None)

    def set_params(self, name: str, params: Any, config: Any = None) -> None:
        """Uses these parameters from now on (a policy in training, say); `config` for a component that the directory lacks."""
        self._params[name] = params
        if config is not None:
            self._configs[name] = config

    def set_config(self, name: str, config: Any) -> None:
        """Computes a component in another way than it is stored (its sizes must be the stored ones); before its first use."""
        self._configs[name] = config

    @functools.cached_property
    def tokenizer(self) -> MultimodalTokenizer:
        """The text tokenizer with its multimodal ids."""
        sizes = {}
        if "transformer" in self.description["components"]:
            c = self.config("transformer")
            sizes = {name: getattr(c, name) for name in ("vocab_size", "image_vocab_size", "mm_vocab_size")}
        return MultimodalTokenizer.load(self.folder("tokenizer"), **sizes)

    def folder(self, name: str) -> Path:
        """The folder of a tokenizer: "tokenizer", "tokenizer_t5" or "tokenizer_clip"; it need not exist."""
        return self.path / name if self.released is None else self.released.folders.get(name, self.path / name)

    @functools.cache
    def encoder_tokenizer(self, name: str) -> Any:
        """The own tokenizer of a text encoder ("t5" or "clip"), or None: then it reads the text tokenizer's ids.

        Raises:
          CheckpointError: the tokenizer and the encoder do not belong together.
        """
        folder = self.folder(f"tokenizer_{name}")
        if not folder.is_dir():
            return None
        own, cfg = read_tokenizer(folder), self.config(name)
        if own.pad_token_id is None:
            raise CheckpointError(f"{folder}: this tokenizer names no padding token; copy the whole folder of FLUX.1-dev")
        if len(own) > cfg.vocab_size:
            raise CheckpointError(f"{folder}: {len(own)} tokens for an encoder of {cfg.vocab_size}; take both from one checkpoint")
        if name == "clip" and own.eos_token_id != cfg.eos_id:
            ends = f"ends texts with id {own.eos_token_id}, the encoder pools at {cfg.eos_id}"
            raise CheckpointError(f"{folder}: {ends}; take both from one checkpoint")
        return own

    @functools.cached_property
    def decode_config(self) -> DecodeConfig:
        """The decoder's default settings."""
        return config_from_json(DecodeConfig, self.description.get("settings", {}).get("decode", {}), f"{self.path}/model.json")

    @functools.cached_property
    def preprocess_config(self) -> ImageLimits:
        """Limits and rounding of input images."""
        stored = self.description.get("settings", {}).get("preprocess", {})
        return config_from_json(ImageLimits, stored, f"{self.path}/model.json")

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The diffusion decoder's modules."""
        return Decoder(*(self.module(name) for name in DECODER_PARTS))

    def decoder_params(self) -> dict[str, Any]:
        """Parameters of the diffusion decoder's parts."""
        return {name: self.params(name) for name in DECODER_PARTS}

    @property
    def patch(self) -> int:
        """Pixels per token along a side."""
        return self.config("siglip_vq").patch

    def fill(self, x_B: Any) -> jax.Array:
        """Repeats the first row until the rows split evenly over the mesh; whoever calls cuts the surplus off again."""
        x_B, short = jnp.asarray(x_B), -len(x_B) % self.ways
        return jnp.concatenate([x_B, jnp.repeat(x_B[:1], short, axis=0)]) if short else x_B

    # ---- text to image ----
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of a picture size; refuses sizes that are not whole tokens or leave the preprocessing limits."""
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
    def _sampler(self, n_codes: int, sampling: SamplingConfig):
        model = self.module("transformer")

        def sample(params, ids_PS, lengths_P, keys_PR, negative):
            return generate_codes(model, params, ids_PS, lengths_P, n_codes, keys_PR, sampling, negative=negative)

        return jax.jit(sample)

    def text_ids(self, prompts: Sequence[str], cfg: DecodeConfig | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The prompts as T5 ids [B, S] and CLIP ids [B, S'], at the decoder's fixed lengths."""
        c = cfg or self.decode_config

        def ids(name: str, length: int) -> np.ndarray:
            own = self.encoder_tokenizer(name)
            return fixed_length_ids(self.tokenizer, prompts, length) if own is None else encoder_ids(own, prompts, length)

        return ids("t5", c.text_length), ids("clip", c.pooled_length)

    def noise(self, keys_B: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Packed starting noise [B, T, C], one key a picture."""
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
        """Codes [B, Y, X] -> pictures. Without `noise` [B, T, C] it is drawn from `seed`; without prompts they are empty."""
        codes_BYX = self.checked(codes_BYX)
        prompts = [""] * len(codes_BYX) if prompts is None else list(prompts)
        if len(prompts) != len(codes_BYX):
            raise ValueError(f"{len(prompts)} prompts for {len(codes_BYX)} pictures' codes; give one each, or none")
        if noise is None:
            noise = self.noise(picture_keys(seed, len(codes_BYX), NOISE), codes_BYX.shape[1:])
        images = self.decode_images(codes_BYX, prompts, noise)
        return [Image.fromarray(image) for image in np.asarray(images)]

    def checked(self, codes_BYX: Any) -> np.ndarray:
        """Codes as an int32 array [B, Y, X]. ValueError when they are no codes of this model's tokenizer."""
        codes_BYX = np.asarray(codes_BYX)
        size = self.config("siglip_vq").codebook_size
        if codes_BYX.ndim != 3 or not codes_BYX.size or not np.issubdtype(codes_BYX.dtype, np.integer):
            raise ValueError(f"codes must be integers [B, Y, X], got {codes_BYX.dtype} {codes_BYX.shape}")
        if codes_BYX.min() < 0 or codes_BYX.max() >= size:
            raise ValueError(f"codes must lie within 0..{size - 1}, got {codes_BYX.min()}..{codes_BYX.max()}; take them from this model's encode")
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
        """One picture per prompt. The defaults are the released ones; picture i depends on (seed, i) and its prompt alone.

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
        codes = self.sample_codes(prompts, grid, picture_keys(seed, len(prompts))[:, None], sampling)["codes"][:, 0]
        return self.decode(codes, prompts, seed=seed)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuses prompts that are empty or longer than the decoder's text encoder takes.

        An encoder with its own tokenizer reads the beginning of a long prompt, as released: T5 with a warning, CLIP as a matter of course.
        """
        limit = self.decode_config.text_length - 1  # an end or padding token closes every row
        own = self.encoder_tokenizer("t5")
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i + 1} is empty; describe the picture")
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
        """Codes [Y, X] of each picture after the released preprocessing, at its own resolution."""
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
        """Answers a question about a picture, greedily, until the end of the turn or `max_tokens` (512 as released)."""
        if not question.strip():
            raise ValueError("the question is empty; ask something about the picture")
        return self.answer([self.encode([image])[0]], [question], max_tokens)[0]

    def answer(
        self, codes: Sequence[np.ndarray], questions: Sequence[str], max_tokens: int = 512, multiple: int = PROMPT_BUCKET
    ) -> list[str]:
        """Greedy answers to one question per picture, given its codes [Y, X]; prompts are padded to a multiple of `multiple`."""
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
        model, stop, pad = self.module("transformer"), (self.tokenizer.end_of_turn,), self.tokenizer.pad
        return jax.jit(lambda params, ids_PS, lengths_P: generate_text(model, params, ids_PS, lengths_P, max_tokens, stop, pad))


def picture_keys(seed: int, n: int, purpose: int = 0) -> jax.Array:
    """One key per picture [n], from (seed, purpose, index): a picture can be drawn again alone."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie within 0..{2**32 - 1}")
    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(n))
