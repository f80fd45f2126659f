"""Fine-tuning on 2,000 images to its best, where launch/claim.sh starts. Command: xomni train --config=configs/tiny/finite.py."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="sft",
            run_dir="runs/claim/sft",
            init_from="xomni_jax/assets/tiny_sft",
            steps=300,
            batch_size=32,
            next_token=dict(rows=14, generation=1.0, understanding=0.0, text=0.0),
            optimizer=dict(name="muon", b1=0.95, learning_rate=1e-3, warmup_steps=10, schedule="linear", final_fraction=0.0),
            data=dict(first=2000, weights=(0.5, 0.5), shapes=0.0, pseudo_words=0.5),
            validation=dict(every=25, best=True),
        )
    )
