"""The control of the long run: more supervised fine-tuning, on the signs that GRPO sees. Command: bash launch/long_run.sh."""

from configs.tiny import sft


def get_config():
    """What differs from the defaults."""
    c = sft.get_config()
    c.update(run_dir="runs/long/control", init_from="xomni_jax/assets/tiny_sft", batch_size=28)
    c.next_token.update(generation=1.0, understanding=0.0, text=0.0)
    c.data = dict(sizes=((32, 128),), weights=(1.0,), text_lengths=((12, 16),), shapes=0.0, pseudo_words=0.5)
    return c
