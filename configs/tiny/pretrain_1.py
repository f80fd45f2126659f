"""Pre-training, stage 1 of 3: only the new parameters learn. Command: xomni train --config=configs/tiny/pretrain_1.py."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/tiny/pretrain_1",
            init_from="runs/tiny/decoder/model",
            steps=60,
            batch_size=32,
            train=("vision",),
            optimizer=dict(name="muon", b1=0.95, warmup_steps=20),
        )
    )
