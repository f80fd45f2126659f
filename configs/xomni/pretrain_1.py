"""Pre-training, stage 1 of 3: only the vision layers, the image embedding and the image head learn. Slice: v5p-256 (v5p-64 for a start).

Command, on every host: xomni train --config=configs/xomni/pretrain_1.py
Before: xomni plan --config=configs/xomni/pretrain_1.py --topology=v5p-256
Expect loss/image falling from 9.7 (16,384 codes by chance) within 200 steps, loss/text unchanged.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.next_token(paths.PRETRAINING, rows=256, row_length=8192),
            train=("vision",),
            stage="pretrain",
            run_dir="runs/xomni/pretrain_1",
            init_from="runs/xomni/decoder/model",
            steps=50000,
            batch_size=400,
            save_every=500,
            optimizer=dict(learning_rate=1e-4, warmup_steps=1000),
        )
    )
