"""Folders of images with captions, and their codes, for tests."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from tests.miniature import stage_config
from xomni_jax.training import tokenize_data
from xomni_jax.training.components import open_model
from xomni_jax.training.tokenize_data import TokenizeConfig, tokenize

opened = functools.cache(open_model)  # and with it the compiled programs of a model


def write_images(folder, count, sizes=((32, 64), (64, 32))):
    """`count` images of random blocks, by turns wide and upright, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for n in range(count):
        height, width = sizes[n % len(sizes)]
        blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{n:03}.png")
        (folder / f"{n:03}.txt").write_text(f"image number {n}")
    return folder


def config(model_dir, *data, file="sft"):
    """A cut-down stage on data of one's own, from captions to images."""
    mixture = ("next_token.generation=0.9", "next_token.understanding=0.0", "next_token.text=0.1") if file == "sft" else ()
    return stage_config(file, "none", f"init_from={model_dir}", *mixture, *(f"data.{option}" for option in data))


def of_folder(path, sizes="((16,32),(32,16))"):
    """Options of a folder of images."""
    return "source=files", f"path={path}", f"sizes={sizes}"


def make_codes(model_dir, data, out, process=0, processes=1, **options):
    """The folder of codes of a source: an image at a time on each device, and small shards, unless told otherwise."""
    options = TokenizeConfig(str(out), **{"batch": 1, "shard": 12, **options})
    original, tokenize_data.open_model = tokenize_data.open_model, opened
    try:
        told = tokenize(config(model_dir, *data), options, process, processes)
    finally:
        tokenize_data.open_model = original
    return told
