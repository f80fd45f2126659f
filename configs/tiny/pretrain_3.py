"""Pre-training, stage 3 of 3: annealing on the best data, real words. Command: xomni train --config=configs/tiny/pretrain_3.py."""

from configs import base


def get_config():
    """The configuration."""
    c = base.pretrain("all")
    c.run_dir = "runs/tiny/pretrain_3"
    c.init_from = "runs/tiny/pretrain_2/model"
    c.steps, c.batch_size = 60, 32
    c.next_token.rows = 14
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.final_fraction = 5e-4, "linear", 0.0
    c.optimizer.warmup_steps = 10
    c.data.weights, c.data.pseudo_words = (0.5, 0.5), 0.3
    c.optimizer.name, c.optimizer.b1 = "muon", 0.95
    return c
