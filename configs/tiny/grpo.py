"""GRPO on signs of 12 to 16 characters, the long documented run. Command: xomni train --config=configs/tiny/grpo.py.

Needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward shapes --port 8002.
"""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    run = dict(run_dir="runs/tiny/grpo", init_from="runs/tiny/sft/model", steps=500)
    return ConfigDict(demo.recipe() | run | dict(data=dict(sizes=((32, 128),), text_lengths=((12, 16),), pseudo_words=0.5)))
