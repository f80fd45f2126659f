"""Pre-training, stage 3 of 3: annealing on the best data, real words. Command: xomni train --config=configs/tiny/pretrain_3.py."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/tiny/pretrain_3",
            init_from="runs/tiny/pretrain_2/model",
            steps=60,
            batch_size=32,
            next_token=dict(rows=14),
            optimizer=dict(name="muon", b1=0.95, learning_rate=5e-4, warmup_steps=10, schedule="linear", final_fraction=0.0),
            data=dict(weights=(0.5, 0.5)),
        )
    )
