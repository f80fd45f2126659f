"""Pre-training, stage 2 of 3: everything learns. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_2.py
Before: xomni plan --config=configs/xomni/pretrain_2.py --topology=v5p-256
Expect loss/image and loss/text falling together.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.pretrain("all")
    c.run_dir = "runs/xomni/pretrain_2"
    c.init_from = "runs/xomni/pretrain_1/model"
    models.released(c)
    models.next_token(c, rows=256, row_length=8192)
    c.steps, c.batch_size, c.save_every = 50000, 400, 500
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-4, 1000
    return c
