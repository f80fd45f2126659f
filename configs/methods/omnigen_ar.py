"""OmniGen-AR on rendered signs: recolour, another word, segmentation and back: xomni train --config=configs/methods/omnigen_ar.py

What to expect: configs/methods/README.md."""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults: the small model goes on learning, on edits alone."""
    return ConfigDict(
        dict(
            stage="sft",
            run_dir="runs/omnigen_ar",
            init_from="xomni_jax/assets/tiny_sft",
            steps=600,
            batch_size=32,
            next_token=dict(generation=1.0, understanding=0.0, text=0.0, hide_condition=0.1, rows=32, row_length=112, target_share=0.5),
            data=dict(source="edits"),
            validation=dict(every=200, batches=8, data=dict(split="heldout")),
        )
    )
