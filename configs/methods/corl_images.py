"""CoRL's refined stage for images, with a KL term, after the unified one: xomni train --config=configs/methods/corl_images.py"""

from configs.methods import corl


def get_config():
    """What differs from the unified stage."""
    c = corl.get_config()
    c.update(run_dir="runs/corl/images", init_from="runs/corl/unified/model", credit=(("total", "image", 1.0),))
    c.grpo.kl_coef = 0.02
    c.own = dict(accuracy=0.0, format=0.0)
    return c
