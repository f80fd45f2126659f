"""The benchmarks on a slice, with wide batches. Slice: v6e-64 or v5p-64.

Command, on every host:
  xomni eval geneval --distributed --config=configs/xomni/evaluate.py --data DATA --out /bucket/runs/geneval --phase generate
Then on any machine, with the judge: the same with --phase score.
Before: xomni plan --config=configs/xomni/evaluate.py --topology=v6e-64
"""

from ml_collections import ConfigDict

from configs.xomni import models


def get_config():
    """What differs from the defaults."""
    return ConfigDict(models.inference(batch=16, decode_batch=4))
