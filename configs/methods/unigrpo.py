"""UniGRPO on short signs: the transformer and the image decoder learn from one reward.

Command: xomni train --config=configs/methods/unigrpo.py. It needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward
shapes --port 8002.
"""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    c = ConfigDict(demo.recipe())
    c.update(stage="unigrpo", run_dir="runs/unigrpo/both", init_from="xomni_jax/assets/tiny_sft", steps=30)
    rates = tuple((f"transformer/{pattern}", rate) for pattern, rate in c.optimizer.rates)
    c.optimizer.rates = (("mmdit/.*", 1.0), *rates)
    c.rollout = dict(prompt_length=24)
    c.decode = dict(steps=4)
    c.flow = dict(window=2, within=3)
    return c
