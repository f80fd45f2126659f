"""SigLIP-VQ with its 1.5B reader, through visual understanding. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/tokenizer.py
Before: xomni plan --config=configs/xomni/tokenizer.py --topology=v6e-64
Expect codes/used near 1 after the restarts end, and accuracy/answer rising from there on.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.tokenizer()
    c.run_dir = "runs/xomni/tokenizer"
    models.released(c)
    c.siglip_vq.update(dict(dtype="bfloat16", remat="full"))
    c.mesh.fsdp, c.mesh.tensor = -1, 1  # the reader has 2 KV heads: tensor is 1 or 2
    c.preprocess.short_size, c.preprocess.long_size, c.preprocess.min_short_size, c.preprocess.max_aspect_ratio = 384, 1152, 128, 3.0
    c.tokenizer.warmup_steps, c.tokenizer.ramp_steps, c.tokenizer.text_length = 2000, 2000, 256
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((384, 384),), (1.0,), ((3, 6),), 0.0
    c.steps, c.batch_size, c.save_every = 50000, 256, 500
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-4, 1000
    return c
