"""GRPO on short signs, as the demo runs it. Command: bash launch/demo.sh."""

from configs import base


def recipe():
    """GRPO for the tiny model on two CPU cores. 64 rollouts a step leave a noisy gradient: what is common to all pictures, the gain of the
    last norm (how sharply codes are drawn), may move fast, other gains and biases slower, and kernels hardly."""
    c = base.grpo()
    c.batch_size, c.grpo.rollouts_per_prompt = 8, 8
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.final_fraction = 6e-5, "linear", 0.2
    c.optimizer.rates = (("mm_norm/scale", 600.0), (".*/(scale|bias)", 100.0))
    c.grpo.kl_coef = 0.03
    c.decode.steps = 2  # reads slightly worse than the model's own 4 and takes half the time
    c.data.pseudo_words = 0.5  # real words alone would be learned by heart
    return c


def get_config():
    """The configuration."""
    c = recipe()
    c.run_dir = "runs/demo/grpo"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.steps = 620
    # Kernels learn faster and sharpen slower than in the long run: codes drawn sharply too soon leave nothing to compare, and errors that greedy
    # decoding makes too stay. Where all rollouts of a prompt read right, rewards differ by 1e-4 of colour: that must not count as a signal.
    c.optimizer.learning_rate, c.optimizer.rates = 1.5e-4, (("mm_norm/scale", 150.0), (".*/(scale|bias)", 60.0))
    c.grpo.kl_coef, c.advantage.eps = 0.02, 0.03
    c.rollout.prompt_length = 24
    return c
