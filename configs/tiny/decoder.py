"""Tiny diffusion decoder. Command: xomni train --config=configs/tiny/decoder.py. Expect: readable signs in RUN/images."""

from configs import base


def get_config():
    """The configuration."""
    c = base.decoder()
    c.run_dir = "runs/tiny/decoder"
    c.init_from = "runs/tiny/tokenizer/model"
    c.steps, c.batch_size = 4000, 32
    c.save_every, c.grid_every = 500, 500
    c.decode.steps = 4
    return c
