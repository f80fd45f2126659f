"""SigLIP-VQ with its 1.5B reader, through visual understanding. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/tokenizer.py
Before: xomni plan --config=configs/xomni/tokenizer.py --topology=v6e-64
Expect codes/used near 1 after the restarts end, and accuracy/answer rising from there on.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.released("siglip_vq", "reader", siglip_vq=dict(dtype="bfloat16", remat="full")),
            stage="tokenizer",
            run_dir="runs/xomni/tokenizer",
            steps=50000,
            batch_size=256,
            save_every=500,
            optimizer=dict(learning_rate=1e-4, warmup_steps=1000),
            tokenizer=dict(warmup_steps=2000, ramp_steps=2000, text_length=256, dense_weight=0.0),
            preprocess=dict(short_size=384, long_size=1152, patch_size=16, min_short_size=128, max_aspect_ratio=3.0),
            data=paths.records(paths.IMAGES_WITH_ANSWERS, (384, 384)),
        )
    )
