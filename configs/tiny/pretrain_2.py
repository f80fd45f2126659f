"""Pre-training, stage 2 of 3: everything learns. Command: xomni train --config=configs/tiny/pretrain_2.py."""

from configs import base


def get_config():
    """The configuration."""
    c = base.pretrain("all")
    c.run_dir = "runs/tiny/pretrain_2"
    c.init_from = "runs/tiny/pretrain_1/model"
    c.steps, c.batch_size = 950, 32
    c.next_token.rows = 14
    c.data.weights, c.data.pseudo_words = (0.4, 0.6), 0.6
    c.optimizer.name, c.optimizer.b1 = "muon", 0.95
    return c
