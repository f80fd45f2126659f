"""Supervised fine-tuning. Command: xomni train --config=configs/tiny/sft.py. Its model starts GRPO and is the one shipped."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="sft",
            run_dir="runs/tiny/sft",
            init_from="runs/tiny/pretrain_3/model",
            steps=60,
            batch_size=32,
            next_token=dict(rows=14),
            optimizer=dict(name="muon", b1=0.95, warmup_steps=20),
            data=dict(weights=(0.5, 0.5)),
        )
    )
