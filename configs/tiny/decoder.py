"""Tiny diffusion decoder. Command: xomni train --config=configs/tiny/decoder.py. Expect: readable signs in RUN/images."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="decoder",
            run_dir="runs/tiny/decoder",
            init_from="runs/tiny/tokenizer/model",
            steps=3000,
            batch_size=16,
            save_every=500,
            grid_every=500,
            decode=dict(steps=4),
            data=dict(text_lengths=((3, 8), (12, 16)), shapes=0.5, centred=0.7),
        )
    )
