"""GRPO on short signs, as the demo runs it. Command: bash launch/demo.sh."""

from configs import base


def recipe():
    """GRPO for the tiny model on two CPU cores: 64 rollouts a step are few, so gains and biases learn most, and the KL holds the rest."""
    c = base.grpo()
    c.batch_size, c.grpo.rollouts_per_prompt = 8, 8
    c.optimizer.learning_rate, c.optimizer.gain_rate, c.optimizer.schedule = 6e-5, 200.0, "linear"
    c.optimizer.final_fraction = 0.3
    c.grpo.kl_coef = 0.03
    c.decode.steps = 2  # reads as well as the model's own 4 and takes half the time
    c.data.pseudo_words = 0.5  # real words alone would be learned by heart
    return c


def get_config():
    """The configuration."""
    c = recipe()
    c.run_dir = "runs/demo/grpo"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.steps = 480
    c.rollout.prompt_length = 24
    return c
