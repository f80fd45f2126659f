"""The control of the long run: more supervised fine-tuning, on the signs that GRPO sees. Command: bash launch/long_run.sh."""

from configs.tiny import sft


def get_config():
    """The configuration."""
    c = sft.get_config()
    c.run_dir = "runs/long/control"
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.batch_size = 28
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((32, 128),), (1.0,), ((12, 16),), 0.0
    c.data.pseudo_words = 0.5
    c.next_token.generation, c.next_token.understanding, c.next_token.text = 1.0, 0.0, 0.0
    return c
