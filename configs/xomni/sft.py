"""Supervised fine-tuning at 16,384 tokens a row. Slice: v6e-64, v5p-64 or v5litepod-256.

Command, on every host: xomni train --config=configs/xomni/sft.py
Before: xomni plan --config=configs/xomni/sft.py --topology=v6e-64
A row holds three images of 1152x1152. Expect loss/image falling by step 100 and data/filled above 0.9.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.next_token(paths.FINE_TUNING, rows=64, row_length=16384),
            stage="sft",
            run_dir="runs/xomni/sft",
            init_from="runs/xomni/pretrain_3/model",
            steps=4000,
            batch_size=192,
            optimizer=dict(learning_rate=1e-5, warmup_steps=100),
        )
    )
