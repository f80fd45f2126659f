"""Pre-training on drawings of emoji, their names and kinds. Command: xomni train --config=configs/emoji/pretrain.py."""

from ml_collections import ConfigDict

from configs.emoji import tokenizer


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/emoji/pretrain",
            init_from="runs/emoji/decoder/model",
            batch_size=30,
            # A caption and its 64 codes take about 85 tokens, an answered question about 120.
            next_token=dict(rows=12, row_length=256, generation=0.5, understanding=0.5, text=0.0),
            optimizer=dict(name="muon", b1=0.95, schedule="constant"),
            data=tokenizer.DATA,
        )
    )
