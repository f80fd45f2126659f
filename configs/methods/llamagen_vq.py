"""LlamaGen's VQ on the digits of MNIST, 28x28 pixels as 7x7 codes: xomni train --config=configs/methods/llamagen_vq.py

Before: xomni data make mnist --size 28 --out data/mnist28. What to expect: configs/methods/README.md."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="vq",
            run_dir="runs/llamagen_vq",
            steps=600,
            batch_size=32,
            grid_every=300,
            llamagen_vq=dict(
                codebook_size=256, code_width=8, z_channels=32, in_features=16, block_channels=(16, 32, 64), layers_per_block=1, groups=8
            ),
            tokenizer=dict(warmup_steps=50, ramp_steps=50),
            optimizer=dict(learning_rate=2e-3),
            data=dict(source="files", path="data/mnist28/train", sizes=((28, 28),)),
            validation=dict(every=150, batches=16, data=dict(path="data/mnist28/heldout")),
        )
    )
