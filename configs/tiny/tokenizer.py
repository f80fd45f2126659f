"""Tiny SigLIP-VQ tokenizer. Command: xomni train --config=configs/tiny/tokenizer.py. Expect: accuracy/dense_labelled above 0.99."""

from configs import base


def get_config():
    """The configuration."""
    c = base.tokenizer()
    c.run_dir = "runs/tiny/tokenizer"
    c.steps, c.batch_size = 1200, 48
    return c
