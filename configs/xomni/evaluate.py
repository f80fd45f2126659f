"""The benchmarks on a slice, with wide batches. Slice: v6e-64 or v5p-64.

Command, on every host: xomni eval geneval --distributed --config=configs/xomni/evaluate.py --data DATA --out /bucket/runs/geneval --phase generate
Then on any machine, with the judge: the same with --phase score.
Before: xomni plan --config=configs/xomni/evaluate.py --topology=v6e-64
"""

from configs.xomni import models


def get_config():
    """The configuration."""
    c = models.inference()
    c.batch, c.decode_batch = 16, 4
    return c
