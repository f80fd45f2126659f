"""CoRL's unified stage on short signs: an image and an answer for the same item, one reward, no KL term.

Command: xomni train --config=configs/methods/corl.py. It needs the services: xomni serve-reward ocr --port 8001 & xomni serve-reward
shapes --port 8002. The refined stages: corl_images.py, corl_answers.py.
"""

from ml_collections import ConfigDict

from configs.tiny import demo


def get_config():
    """What differs from the defaults."""
    c = ConfigDict(demo.recipe())
    c.update(stage="corl", run_dir="runs/corl/unified", init_from="xomni_jax/assets/tiny_sft", steps=60)
    c.grpo.kl_coef = 0.0
    c.rollout = dict(prompt_length=24)
    c.answers = dict(length=12, prompt_length=64, form="(.+)", description="what does the sign say?")
    return c
