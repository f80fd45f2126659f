"""GRPO on prompts alone, from the best of 2,000 images (finite.py), on signs of both lengths. Command: bash launch/claim.sh."""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    run = dict(run_dir="runs/claim/grpo", init_from="runs/claim/sft/model", steps=200)
    data = dict(sizes=((32, 64), (32, 128)), weights=(0.5, 0.5), text_lengths=((3, 6), (12, 16)), pseudo_words=0.5)
    return ConfigDict(demo.recipe() | run | dict(data=data))
