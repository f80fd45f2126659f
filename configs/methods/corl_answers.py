"""CoRL's refined stage for answers, with a KL term, after the unified one: xomni train --config=configs/methods/corl_answers.py"""

from configs.methods import corl


def get_config():
    """What differs from the unified stage. The services are asked and not counted: the images do not learn."""
    c = corl.get_config()
    c.update(run_dir="runs/corl/answers", init_from="runs/corl/unified/model", credit=(("total", "answer", 1.0),))
    c.grpo.kl_coef = 0.02
    c.own = dict(perceptual=0.0, recaption=0.0, matching=0.0)
    c.rewards = dict(ocr=dict(weight=0.0), shapes=dict(weight=0.0))
    return c
