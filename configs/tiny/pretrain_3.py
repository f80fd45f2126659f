"""Pre-training, stage 3 of 3: mostly drawing. Command: xomni train --config=configs/tiny/pretrain_3.py."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/tiny/pretrain_3",
            init_from="runs/tiny/pretrain_2/model",
            steps=600,
            batch_size=32,
            next_token=dict(rows=14, generation=0.65, understanding=0.35, text=0.0),
            optimizer=dict(name="muon", b1=0.95, schedule="constant"),
            data=dict(weights=(0.6, 0.4), text_lengths=((3, 8), (12, 16)), shapes=0.5, centred=0.9, pseudo_words=0.5),
        )
    )
