"""TwiG-GRPO on short signs: a thought before each half of the image, one reward for thoughts and codes.

Command: xomni train --config=configs/methods/twig.py. It needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward
shapes --port 8002.
"""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    c = ConfigDict(demo.recipe())
    c.update(stage="twig", run_dir="runs/twig", init_from="xomni_jax/assets/tiny_sft", steps=60)
    c.rollout = dict(prompt_length=24)
    c.thoughts = dict(bands=2, length=12)
    return c
