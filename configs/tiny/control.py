"""The control of the long run: more supervised fine-tuning on the same kind of signs. Command: bash launch/long_run.sh."""

from configs import base


def get_config():
    """The configuration."""
    c = base.sft()
    c.run_dir = "runs/long/control"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.batch_size = 36
    c.optimizer.schedule = "constant"
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((32, 128),), (1.0,), ((12, 16),), 0.0
    c.data.pseudo_words = 0.0
    c.next_token.generation, c.next_token.understanding, c.next_token.text = 1.0, 0.0, 0.0
    return c
