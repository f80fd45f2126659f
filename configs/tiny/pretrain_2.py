"""Pre-training, stage 2 of 3: everything learns, mostly reading. Command: xomni train --config=configs/tiny/pretrain_2.py."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/tiny/pretrain_2",
            init_from="runs/tiny/pretrain_1/model",
            steps=600,
            batch_size=32,
            next_token=dict(rows=14, generation=0.4, understanding=0.6, text=0.0),
            optimizer=dict(name="muon", b1=0.95, schedule="constant"),
            data=dict(weights=(0.5, 0.5), text_lengths=((3, 8), (12, 16)), shapes=0.5, centred=0.8, pseudo_words=0.6),
        )
    )
