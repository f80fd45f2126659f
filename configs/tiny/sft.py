"""Supervised fine-tuning. Command: xomni train --config=configs/tiny/sft.py. Its model starts GRPO and is the one shipped."""

from configs import base


def get_config():
    """The configuration."""
    c = base.sft()
    c.run_dir = "runs/tiny/sft"
    c.init_from = "runs/tiny/pretrain_3/model"
    c.steps, c.batch_size = 60, 32
    c.next_token.rows = 14
    c.optimizer.warmup_steps = 20
    c.data.weights, c.data.pseudo_words = (0.5, 0.5), 0.3
    c.optimizer.name, c.optimizer.b1 = "muon", 0.95
    return c
