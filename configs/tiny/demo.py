"""GRPO on short signs, as the demo runs it. Command: bash launch/demo.sh."""

from configs import base


def recipe():
    """GRPO for the tiny model on two CPU cores. 64 rollouts a step leave a noisy gradient: norm gains and biases may move fast, the gain of
    the last norm (how sharply codes are drawn) a little faster, kernels slowly. Codes drawn sharply too soon leave nothing to compare."""
    c = base.grpo()
    c.batch_size, c.grpo.rollouts_per_prompt = 8, 8
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.final_fraction = 1.5e-4, "linear", 0.2
    c.optimizer.rates = (("mm_norm/scale", 150.0), (".*/(scale|bias)", 60.0))
    c.grpo.kl_coef = 0.02
    c.advantage.eps = 0.03  # where all rollouts of a prompt read right, 1e-4 of colour is left between them: noise, not a signal
    c.decode.steps = 2  # reads slightly worse than the model's own 4 and takes half the time
    c.data.pseudo_words = 0.5  # real words alone would be learned by heart
    return c


def get_config():
    """The configuration."""
    c = recipe()
    c.run_dir = "runs/demo/grpo"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.steps = 620
    c.rollout.prompt_length = 24
    return c
