"""Supervised fine-tuning. Command: xomni train --config=configs/tiny/sft.py. Its model starts GRPO and is the one shipped."""

from configs import base


def get_config():
    """The configuration."""
    c = base.sft()
    c.run_dir = "runs/tiny/sft"
    c.init_from = "runs/tiny/pretrain_3/model"
    c.steps, c.batch_size = 40, 40
    c.data.pseudo_words = 0.0
    return c
