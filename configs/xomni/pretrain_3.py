"""Pre-training, stage 3 of 3: annealing on the best data. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_3.py
Before: xomni plan --config=configs/xomni/pretrain_3.py --topology=v5p-256
Expect a last drop of both losses while the learning rate falls to 0.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.next_token(paths.ANNEALING, rows=256, row_length=8192),
            stage="pretrain",
            run_dir="runs/xomni/pretrain_3",
            init_from="runs/xomni/pretrain_2/model",
            steps=50000,
            batch_size=400,
            save_every=500,
            optimizer=dict(learning_rate=2e-5, warmup_steps=1000, schedule="linear", final_fraction=0.0),
        )
    )
