"""Drawing and chatting on one host. Slice: v6e-8, or v5litepod-8 with --config.mmdit.int8=True --config.t5.int8=True.

Command: xomni generate --config=configs/xomni/generate.py 'a shop sign that says "OPEN"'
Before: xomni plan --config=configs/xomni/generate.py --topology=v6e-8
"""

from configs.xomni import models


def get_config():
    """The configuration."""
    c = models.inference()
    c.batch = c.decode_batch = 2
    return c
