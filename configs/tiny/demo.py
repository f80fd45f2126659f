"""GRPO on short signs, as the demo runs it. Command: bash launch/demo.sh."""

from configs import base


def get_config():
    """The configuration."""
    c = base.grpo()
    c.run_dir = "runs/demo/grpo"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.steps, c.batch_size = 120, 8
    c.optimizer.learning_rate = 3e-4
    c.grpo.rollouts_per_prompt = 8
    return c
