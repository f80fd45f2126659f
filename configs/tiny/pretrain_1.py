"""Pre-training, stage 1 of 3: only the new parameters learn. Command: xomni train --config=configs/tiny/pretrain_1.py."""

from configs import base


def get_config():
    """The configuration."""
    c = base.pretrain("vision")
    c.run_dir = "runs/tiny/pretrain_1"
    c.init_from = "runs/tiny/decoder/model"
    c.steps, c.batch_size = 60, 32
    c.optimizer.warmup_steps = 20
    c.optimizer.name, c.optimizer.b1 = "muon", 0.95
    return c
