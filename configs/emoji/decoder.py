"""The diffusion decoder on drawings of emoji. Command: xomni train --config=configs/emoji/decoder.py. RUN/images shows reconstructions."""

from ml_collections import ConfigDict

from configs.emoji import tokenizer


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="decoder",
            run_dir="runs/emoji/decoder",
            init_from="runs/emoji/tokenizer/model",
            steps=2000,
            batch_size=16,
            decode=dict(steps=4),
            data=tokenizer.DATA,
        )
    )
