"""A complete random model of the smallest sizes that exercise everything, and the shipped configurations cut down to it.

16 x 32 pixels are 2 x 4 tokens; one layer per stack; two decoder steps. Sizes divide over 8 devices.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from ml_collections import ConfigDict

from xomni_jax.core.config import Changes, as_dict, load_changes, merge_overrides, updated
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.models.registry import COMPONENTS as ROWS
from xomni_jax.models.registry import init_params
from xomni_jax.sampling.decoder import DecodeConfig
from xomni_jax.training.components import ImageSize, export_model
from xomni_jax.training.stage import RunConfig, resolve

ROOT = Path(__file__).parents[1]
SIZE, GRID, CODES = (16, 32), (2, 4), 64

# Section -> fields of the preset that are made small.
SECTIONS = {
    "transformer": dict(
        image_vocab_size=CODES, d_model=32, mlp_dim=48, n_heads=4, n_kv_heads=2, head_dim=8,
        n_language_layers=1, n_adapter_layers=1, n_head_layers=1,
    ),
    "siglip_vq": dict(width=32, layers=1, heads=2, mlp=48, pos_grid=5, codebook_size=CODES, code_width=8, conv_blocks=1, groups=4),
    "reader": dict(d_model=32, mlp_dim=48, n_heads=2, n_kv_heads=2, head_dim=8, n_layers=1),
    "mmdit": dict(
        d_model=32, n_heads=2, axes_dims=(4, 6, 6), n_double=1, n_single=1, text_dim=16, pooled_dim=16, semantic_dim=32, unroll=1
    ),
    "t5": dict(d_model=16, n_layers=1, n_heads=2, head_dim=8, mlp_dim=32),
    "clip": dict(d_model=16, n_layers=1, n_heads=2, mlp_dim=32),
    "autoencoder": dict(),
    "omnitokenizer": dict(width=16, heads=2, head_dim=8, decoder_blocks="t", codebook_size=CODES),
    "llamagen_vq": dict(codebook_size=CODES, z_channels=16, in_features=16, block_channels=(16, 32)),
}  # fmt: skip
COMPONENTS = tuple(name for name in SECTIONS if name != "reader")
OTHERS = ("llamagen_vq", "omnitokenizer")  # components that belong to no X-Omni
DECODE = dict(steps=2, text_length=32, pooled_length=16)
PREPROCESS = dict(short_size=16, long_size=48, min_short_size=8, max_aspect_ratio=4.0)

# Other sections, where they exist.
CHANGES = {
    "optimizer": dict(warmup_steps=1, learning_rate=1e-2),
    "data": dict(sizes=(SIZE,), weights=(1.0,), text_lengths=((2, 3),), shapes=0.0),
    "tokenizer": dict(warmup_steps=1, ramp_steps=1, start_batches=2, restart_every=2, restart_until=1.0, text_length=24),
    "preprocess": PREPROCESS,
    "next_token": dict(rows=4, row_length=64),
    "decode": dict(steps=2),
    "grpo": dict(rollouts_per_prompt=4),
    "rollout": dict(chunks=1),
    "mesh": dict(fsdp=4, tensor=2),
}
PRESET_OF = {"autoencoder": "identity-4"}


def configs() -> dict:
    """{component: config dataclass}."""
    return {name: updated(ROWS[name].presets[PRESET_OF.get(name, "tiny")], SECTIONS[name], name) for name in COMPONENTS}


def stage_config(file: str, run_dir: Path | str, *overrides: str) -> RunConfig:
    """configs/tiny/FILE.py cut down; three steps of four examples, a checkpoint after the second."""
    return resolve(Changes(stage_changes(file, run_dir, *overrides).to_dict()))


def stage_changes(file: str, run_dir: Path | str, *overrides: str) -> ConfigDict:
    """The same as what a config file returns."""
    values = load_changes(ROOT / "configs" / "tiny" / f"{file}.py").values
    for name in as_dict(resolve(Changes(values))):
        if name in SECTIONS or name in CHANGES:
            values[name] = {**values.get(name, {}), **SECTIONS.get(name, {}), **CHANGES.get(name, {})}
    if file == "decoder":
        values["decode"].update(DECODE)
    size = ("init_from=", "steps=3", "batch_size=4", "log_every=1", "save_every=2", "grid_every=2")
    merge_overrides(values, (f"run_dir={run_dir}", *size, *overrides))
    return ConfigDict(values)


def random_params(name: str, cfg: object, seed: int) -> dict:
    """Parameters of a component without a zero among them, which would hide what depends on it; drawn, not compiled."""
    shapes = meta.unbox(jax.eval_shape(lambda: init_params(name, cfg, jax.random.key(seed))))
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        return jnp.asarray(float(path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A complete random model directory, written as a training stage writes one."""
    directory = tmp_path_factory.mktemp("miniature") / "model"
    trained = {name: (random_params(name, cfg, seed), cfg) for seed, (name, cfg) in enumerate(configs().items()) if name not in OTHERS}
    settings = {"decode": DecodeConfig(**DECODE), "size": ImageSize(*SIZE), "preprocess": ImageLimits(patch_size=8, **PREPROCESS)}
    export_model(directory, trained, "", {"run": "random"}, settings)
    return directory
