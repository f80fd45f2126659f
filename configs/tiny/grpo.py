"""GRPO on signs of 12 to 16 characters, the long documented run. Command: xomni train --config=configs/tiny/grpo.py.

Needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward shapes --port 8002.
"""

from configs.tiny import demo


def get_config():
    """The configuration."""
    c = demo.recipe()
    c.run_dir = "runs/tiny/grpo"
    c.init_from = "runs/tiny/sft/model"
    c.steps = 150
    # As the results in this folder were made; the demo's recipe came later and reaches further.
    c.optimizer.learning_rate, c.optimizer.rates = 6e-5, (("mm_norm/scale", 600.0), (".*/(scale|bias)", 100.0))
    c.grpo.kl_coef, c.advantage.eps = 0.03, 1e-4
    c.data.sizes, c.data.text_lengths = ((32, 128),), ((12, 16),)
    return c
