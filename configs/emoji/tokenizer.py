"""SigLIP-VQ on emoji. Command: xomni train --config=configs/emoji/tokenizer.py. Before: xomni data make emoji --out data/emoji"""

from ml_collections import ConfigDict

DATA = dict(source="files", path="data/emoji/train", sizes=((64, 64),))


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="tokenizer",
            run_dir="runs/emoji/tokenizer",
            steps=400,
            batch_size=32,
            tokenizer=dict(warmup_steps=100, ramp_steps=50),
            data=DATA,
        )
    )
