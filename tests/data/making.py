"""Folders of images with captions, and their codes, for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.miniature import stage_config
from xomni_jax.training.tokenize_data import TokenizeConfig, tokenize


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


def folder_config(model_dir, path, *overrides, file="sft", run_dir="none"):
    """A cut-down stage on a folder of images of two sizes."""
    data = ("data.source=folder", f"data.path={path}", "data.sizes=((16,32),(32,16))")
    mixture = ("next_token.generation=0.9", "next_token.understanding=0.0", "next_token.text=0.1") if file == "sft" else ()
    changed = {o.partition("=")[0] for o in overrides}
    kept = (o for o in (*data, *mixture) if o.partition("=")[0] not in changed)
    return stage_config(file, run_dir, f"init_from={model_dir}", *kept, *overrides)


def make_codes(model_dir, images, out, *overrides, **options):
    """The folder of codes of a folder of images, a record a device and small shards unless told otherwise."""
    tokenize(folder_config(model_dir, images, *overrides), TokenizeConfig(str(out), **{"batch": 1, "shard": 12, **options}))
    return out
