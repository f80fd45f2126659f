"""GRPO on signs of 12 to 16 characters, the long documented run. Command: xomni train --config=configs/tiny/grpo.py.

Needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward shapes --port 8002.
"""

from configs.tiny import demo


def get_config():
    """The configuration."""
    c = demo.recipe()
    c.run_dir = "runs/tiny/grpo"
    c.init_from = "runs/tiny/sft/model"
    c.steps = 500
    c.data.sizes, c.data.text_lengths = ((32, 128),), ((12, 16),)
    return c
