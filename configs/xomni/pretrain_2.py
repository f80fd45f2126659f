"""Pre-training, stage 2 of 3: everything learns. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_2.py
Before: xomni plan --config=configs/xomni/pretrain_2.py --topology=v5p-256
Expect loss/image and loss/text falling together.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.next_token(paths.PRETRAINING, rows=256, row_length=8192),
            stage="pretrain",
            run_dir="runs/xomni/pretrain_2",
            init_from="runs/xomni/pretrain_1/model",
            steps=50000,
            batch_size=400,
            save_every=500,
            optimizer=dict(learning_rate=1e-4, warmup_steps=1000),
        )
    )
