"""Pre-training, stage 3 of 3: annealing on the best data. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_3.py
Before: xomni plan --config=configs/xomni/pretrain_3.py --topology=v5p-256
Expect a last drop of both losses while the learning rate falls to 0.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.pretrain("all")
    c.run_dir = "runs/xomni/pretrain_3"
    c.init_from = "runs/xomni/pretrain_2/model"
    models.released(c)
    models.next_token(c, rows=256, row_length=8192)
    c.steps, c.batch_size, c.save_every = 50000, 400, 500
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 2e-5, 1000
    c.optimizer.schedule, c.optimizer.final_fraction = "linear", 0.0
    return c
