"""Tiny diffusion decoder. Command: xomni train --config=configs/tiny/decoder.py. Expect: readable signs in RUN/images."""

from configs import base


def get_config():
    """The configuration."""
    c = base.decoder()
    c.run_dir = "runs/tiny/decoder"
    c.init_from = "runs/tiny/tokenizer/model"
    c.steps, c.batch_size = 1200, 32
    return c
