"""STAR on the digits of MNIST, 7x7 codes in the order of spanning trees: xomni train --config=configs/methods/star.py

Before: xomni train --config=configs/methods/llamagen_vq.py, whose tokenizer makes the codes. What to expect: configs/methods/README.md."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults. `--config.transformer.order=raster` is the model that it is compared with."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/star",
            init_from="runs/llamagen_vq/model",
            steps=800,
            batch_size=32,
            transformer=dict(
                d_model=96, mlp_dim=256, n_heads=3, n_kv_heads=3, n_language_layers=4, n_adapter_layers=0, n_head_layers=0,
                order="spanning_tree",
            ),
            next_token=dict(generation=1.0, understanding=0.0, text=0.0, rows=32, row_length=72, target_share=0.7),
            data=dict(source="files", path="data/mnist28/train", sizes=((28, 28),)),
            validation=dict(every=200, batches=8, data=dict(path="data/mnist28/heldout")),
        )
    )  # fmt: skip
