"""Supervised fine-tuning. Command: xomni train --config=configs/tiny/sft.py. Its model starts GRPO and is the one shipped."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="sft",
            run_dir="runs/tiny/sft",
            init_from="runs/tiny/pretrain_3/model",
            steps=100,
            batch_size=36,
            next_token=dict(rows=14, generation=0.7, understanding=0.3, text=0.0),
            optimizer=dict(name="muon", b1=0.95, learning_rate=1e-3, warmup_steps=10, schedule="linear", final_fraction=0.0),
            data=dict(weights=(0.85, 0.15), text_lengths=((3, 8), (12, 16)), shapes=0.85),
        )
    )
