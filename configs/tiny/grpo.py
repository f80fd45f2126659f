"""GRPO on signs of 12 to 16 characters, the long documented run. Command: xomni train --config=configs/tiny/grpo.py.

Needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward shapes --port 8002.
"""

from configs import base


def get_config():
    """The configuration."""
    c = base.grpo()
    c.run_dir = "runs/tiny/grpo"
    c.init_from = "runs/tiny/sft/model"
    c.steps, c.batch_size = 600, 8
    c.data.sizes, c.data.text_lengths = ((32, 128),), ((12, 16),)
    c.optimizer.learning_rate = 3e-4
    c.grpo.rollouts_per_prompt = 8
    return c
