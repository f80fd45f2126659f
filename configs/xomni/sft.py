"""Supervised fine-tuning at 16,384 tokens a row. Slice: v6e-64, v5p-64 or v5litepod-256.

Command, on every host: xomni train --config=configs/xomni/sft.py
Before: xomni plan --config=configs/xomni/sft.py --topology=v6e-64
A row holds three images of 1152x1152. Expect loss/image falling by step 100 and data/filled above 0.9.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.sft()
    c.run_dir = "runs/xomni/sft"
    c.init_from = "runs/xomni/pretrain_3/model"
    models.released(c)
    models.next_token(c, rows=64, row_length=16384)
    c.steps, c.batch_size, c.save_every = 4000, 192, 200
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-5, 100
    return c
