"""Fine-tuning on drawings of emoji while the learning rate falls to 0. Command: xomni train --config=configs/emoji/sft.py."""

from configs.emoji import pretrain


def get_config():
    """What differs from the defaults."""
    c = pretrain.get_config()
    c.update(stage="sft", run_dir="runs/emoji/sft", init_from="runs/emoji/pretrain/model", steps=100)
    c.optimizer.update(learning_rate=1e-3, warmup_steps=10, schedule="linear", final_fraction=0.0)
    return c
