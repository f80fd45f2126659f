"""LlamaGen's class-conditional model on the digits of MNIST: xomni train --config=configs/methods/llamagen_c2i.py

Before: xomni train --config=configs/methods/llamagen_vq.py, whose tokenizer makes the codes. What to expect: configs/methods/README.md."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults. Captions are class numbers; one in ten is dropped, for guidance."""
    return ConfigDict(
        dict(
            stage="pretrain",
            run_dir="runs/llamagen_c2i",
            init_from="runs/llamagen_vq/model",
            steps=400,
            batch_size=64,
            transformer=dict(
                vocab_size=11, mm_vocab_size=256, image_vocab_size=256, grid_columns=7, d_model=96, mlp_dim=256, n_heads=3, n_kv_heads=3,
                n_language_layers=3, n_adapter_layers=0, n_head_layers=0, qkv_bias=False,
            ),
            next_token=dict(generation=1.0, understanding=0.0, text=0.0, rows=64, row_length=50),
            data=dict(source="files", path="data/mnist28/train", caption="concept", sizes=((28, 28),)),
        )
    )  # fmt: skip
