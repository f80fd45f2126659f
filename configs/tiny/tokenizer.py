"""Tiny SigLIP-VQ tokenizer. Command: xomni train --config=configs/tiny/tokenizer.py. Expect: accuracy/dense_labelled above 0.99."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="tokenizer",
            run_dir="runs/tiny/tokenizer",
            steps=800,
            batch_size=48,
            data=dict(text_lengths=((3, 8), (12, 16)), shapes=0.5, centred=0.7),
        )
    )
