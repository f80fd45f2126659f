"""Janus-Pro-R1 on short signs: the transformer judges its image and draws another where the verdict is no.

Command, after that of janus_pro_r1_sft.py: xomni train --config=configs/methods/janus_pro_r1.py. It needs the services:
xomni serve-reward ocr --port 8001 & xomni serve-reward shapes --port 8002.
"""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    c = ConfigDict(demo.recipe())
    c.update(stage="janus_pro_r1", run_dir="runs/janus_pro_r1", init_from="runs/janus_pro_r1_sft/model", steps=60)
    c.rollout = dict(prompt_length=24)
    c.verdict = dict(question="is it right?", length=24, threshold=1.5)
    return c
