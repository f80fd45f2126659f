"""Pre-training, stage 1 of 3: only the vision layers, the image embedding and the image head learn. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_1.py
Before: xomni plan --config=configs/xomni/pretrain_1.py --topology=v5p-256
Expect loss/image falling from 9.7 (16,384 codes by chance) within 200 steps, loss/text unchanged.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.pretrain("vision")
    c.run_dir = "runs/xomni/pretrain_1"
    c.init_from = "runs/xomni/decoder/model"
    models.released(c)
    models.next_token(c, rows=256, row_length=8192)
    c.steps, c.batch_size, c.save_every = 50000, 400, 500
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-4, 1000
    return c
