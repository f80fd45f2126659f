"""GRPO on the fine-tuned model. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/grpo.py
Before: xomni plan --config=configs/xomni/grpo.py --topology=v6e-64
Needs the reward services (xomni serve-reward) at config.rewards.*.urls. Expect grpo/kl below 0.05 and reward/*/mean rising within 50 steps.
"""

from configs import base
from configs.xomni import models


def get_config():
    """The configuration."""
    c = base.grpo()
    c.run_dir = "runs/xomni/grpo"
    c.init_from = "runs/xomni/sft/model"
    models.released(c)
    c.mesh.fsdp, c.mesh.tensor = -1, 4
    c.batch_size, c.grpo.rollouts_per_prompt = 32, 16
    c.rollout.prompt_length, c.rollout.chunks = 448, 2  # with 5,184 codes: eleven blocks of 512 tokens
    c.rollout.reference_dtype = "bfloat16"
    c.rollout.micro_batch, c.rollout.logit_chunk = 64, 1296
    c.decode.steps, c.decode.guidance = 28, 1.0
    c.data.sizes = ((1152, 1152),)
    c.steps, c.save_every = 200, 20
    return c
