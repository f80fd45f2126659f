"""The components of a model directory on one mesh: configs, modules, parameters, tokenizers, settings. Each loads when first used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
from flax import linen as nn
from jax.sharding import Mesh

from xomni_jax.checkpoint.adapter import load_adapter
from xomni_jax.checkpoint.formats import is_released
from xomni_jax.checkpoint.released_model import ReleasedModel
from xomni_jax.checkpoint.store import CheckpointError, config_from_json, load_component, read_model_json
from xomni_jax.core.cache import cached_method
from xomni_jax.core.kept import kept, kept_program
from xomni_jax.core.shipped import shipped
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.models.int8 import quantize
from xomni_jax.models.lora import merge
from xomni_jax.models.registry import COMPONENTS, boxed_shapes
from xomni_jax.sampling.batches import Batch, make_batches
from xomni_jax.sampling.decoder import DECODER_COMPONENTS, DecodeConfig, Decoder
from xomni_jax.sequence.classes import ClassTokenizer
from xomni_jax.sequence.tokenizer import MultimodalTokenizer, read_tokenizer
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.sharding.rules import ROLLOUT_RULES, RULES, num_data_shards, param_shardings
from xomni_jax.tokenizers.protocol import ImageTokenizer
from xomni_jax.tokenizers.registry import IMAGE_TOKENIZERS, tokenizer_in


class ModelComponents:
    """The components of `pipeline.XOmni`. Construction reads only the description; a missing component is an error when it is used.

    Args:
      path: a model directory (it holds model.json), or a released PyTorch directory as downloaded, which is converted while it is read.
      mesh: where the parameters go; by default one device.
      dtype: casts every parameter; None keeps the stored number formats.
      flux: with a released directory, the directory of FLUX.1-dev, which holds the VAE and the text encoders.
      training: uses the training layout of the transformer's parameters instead of the sampling one.
    """

    def __init__(
        self, path: str | Path, mesh: Mesh | None = None, dtype: Any = None, flux: str | Path | None = None, training: bool = False
    ):
        path = Path(shipped(str(path)))
        self.path, self.dtype, self._flux, self._training = path, dtype, flux, training
        self.mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
        self.released = ReleasedModel(path, flux) if is_released(path) else None
        if flux is not None and self.released is None:
            raise CheckpointError(f"{path}: is a model directory, which has its own VAE and text encoders; leave flux out")
        self.description = read_model_json(path) if self.released is None else self.released.description
        self.num_data_shards = num_data_shards(self.mesh)
        self._params: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}
        self._adapters: tuple[dict[str, Any], float] = {}, 1.0

    def on(self, mesh: Mesh) -> Self:
        """The same model on another mesh, where it loads its own copy of the parameters."""
        other = type(self)(self.path, mesh, self.dtype, self._flux, self._training)
        other._configs, other._adapters = dict(self._configs), self._adapters
        return other

    def config(self, name: str) -> Any:
        """Config dataclass of a component. Raises CheckpointError when the directory lacks it."""
        if name in self._configs:
            return self._configs[name]
        described = self.description["components"].get(name)
        if described is None and self.released and name in self.released.errors:
            raise CheckpointError(self.released.errors[name].splitlines()[0])
        if described is None:
            have = ", ".join(sorted(self.description["components"])) or "nothing"
            raise CheckpointError(f"{self.path}: this model has no {name} (it has {have}); train that stage, or use a complete model")
        return config_from_json(COMPONENTS[name].config, described["config"], f"{self.path}/model.json")

    @cached_method
    def module(self, name: str) -> nn.Module:
        """The linen module of a component."""
        return COMPONENTS[name].module(self.config(name))

    def params(self, name: str) -> Any:
        """Parameters of a component, sharded over the mesh; restored once."""
        if name not in self._params:
            self._params[name] = self._restore(name, self.config(name))
        return self._params[name]

    def _restore(self, name: str, cfg: Any) -> Any:
        boxed = kept(("shapes", name, cfg), lambda: boxed_shapes(name, cfg))
        shardings = param_shardings(boxed, self.mesh, ROLLOUT_RULES if name == "transformer" and not self._training else RULES)
        if getattr(cfg, "int8", False):
            stored = self._restore(name, dataclasses.replace(cfg, int8=False))
            return jax.jit(lambda params: quantize(params, boxed), out_shardings=shardings)(stored)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings)
        read = functools.partial(load_component, self.path) if self.released is None else self.released.load
        # A config given by the caller (`set_config`) decides the number format too.
        dtype = cfg.param_dtype if self.dtype is None and name in self._configs else self.dtype
        params, (adapters, scale) = read(name, wanted, dtype) if jax.tree.leaves(wanted) else {}, self._adapters
        if name in adapters:
            add = jax.jit(functools.partial(merge, scale=scale), donate_argnums=0, out_shardings=shardings)
            params = add(params, adapters[name])
        return params

    def adapt(self, directory: str | Path) -> None:
        """Adds the adapters of a directory, RUN/adapter of a training, to the kernels of the components when these load.

        Raises:
          CheckpointError: there are none, or they belong to another model.
        """
        self._adapters = load_adapter(directory, self.path)

    def release(self, name: str) -> None:
        """Drops a component's parameters; the next use restores them."""
        self._params.pop(name, None)

    def set_params(self, name: str, params: Any, config: Any = None) -> None:
        """Replaces a component's parameters, by those of a policy in training, say; `config` is for one that the directory lacks."""
        self._params[name] = params
        if config is not None:
            self._configs[name] = config

    def set_config(self, name: str, config: Any) -> None:
        """Replaces a component's config by one of the same sizes, to compute it differently; call it before the component is used."""
        self._configs[name] = config

    @functools.cached_property
    def tokenizer(self) -> MultimodalTokenizer | ClassTokenizer:
        """The text tokenizer with the ids of image codes; of a class-conditional model, that of class numbers."""
        sizes = {}
        if "transformer" in {**self.description["components"], **self._configs}:
            c = self.config("transformer")
            if c.grid_columns:
                return ClassTokenizer(c.vocab_size - 1, c.grid_columns, c.image_vocab_size)
            sizes = {name: getattr(c, name) for name in ("vocab_size", "image_vocab_size", "mm_vocab_size")}
        return MultimodalTokenizer.load(self.folder("tokenizer"), **sizes)

    def folder(self, name: str) -> Path:
        """Folder of a tokenizer: "tokenizer", "tokenizer_t5" or "tokenizer_clip"; it need not exist."""
        return self.path / name if self.released is None else self.released.folders.get(name, self.path / name)

    @cached_method
    def encoder_tokenizer(self, name: str) -> Any:
        """The tokenizer of a text encoder ("t5" or "clip"), or None where the encoder takes the text tokenizer's ids.

        Raises:
          CheckpointError: the tokenizer does not fit the encoder.
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
        """Accepted images and the size they are resized to."""
        stored = self.description.get("settings", {}).get("preprocess", {})
        return config_from_json(ImageLimits, stored, f"{self.path}/model.json")

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The diffusion decoder's modules."""
        return Decoder(*(self.module(name) for name in DECODER_COMPONENTS))

    def decoder_params(self) -> dict[str, Any]:
        """Parameters of the diffusion decoder's components."""
        return {name: self.params(name) for name in DECODER_COMPONENTS}

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """The image tokenizer; its parameters are those of its component."""
        name = tokenizer_in({**self.description["components"], **self._configs})
        return IMAGE_TOKENIZERS[name](self.config(name))

    @property
    def patch(self) -> int:
        """Pixels per token along a side."""
        return self.image_tokenizer.config.patch

    def kept(self, program: Callable[..., Any], *about: Any, donate: int | None = None) -> Callable[..., Any]:
        """A jitted program, on one CPU traced once for all processes; see `core.kept`."""
        # Elsewhere compilation takes longest, and kernels are calls whose form may change from version to version.
        alone = self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"
        return kept_program(program, about, donate) if alone else program

    def batches(self, rows: int, batch_size: int | None = None) -> list[Batch]:
        """Batches of `rows` rows that split over the mesh: `batch_size` rows at a time in each data shard, or all at once.

        Fewer rows fill a batch up to a power of two, so that not every number of rows is a program of its own.
        """
        each = -(-rows // self.num_data_shards)
        if batch_size is not None:
            each = min(batch_size, 1 << (each - 1).bit_length())
        return make_batches(rows, each * self.num_data_shards)
