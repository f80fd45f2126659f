"""The diffusion decoder: FLUX.1-dev fine-tuned on codes of real images, text encoders and VAE frozen. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/decoder.py
Before: xomni plan --config=configs/xomni/decoder.py --topology=v6e-64
Start from a model directory that holds FLUX.1-dev's parts beside the tokenizer.
Expect images in RUN/images that follow the codes by step 2,000.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.decoder()
    c.run_dir = "runs/xomni/decoder"
    c.init_from = "runs/xomni/tokenizer/model"
    models.released(c)
    c.mmdit.param_dtype = "float32"  # it learns
    c.mesh.fsdp, c.mesh.tensor = -1, 4
    c.decoder.train_text_encoders = False
    c.decode.steps, c.decode.text_length, c.decode.pooled_length = 28, 512, 77
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((1152, 1152),), (1.0,), ((3, 6),), 0.0
    c.steps, c.batch_size, c.save_every = 20000, 64, 500
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-5, 500
    return c
