"""Drawing and chatting on one host. Slice: v6e-8 or v5litepod-8.

Command: xomni generate --config=configs/xomni/generate.py 'a shop sign that says "OPEN"'
Before: xomni plan --config=configs/xomni/generate.py --topology=v6e-8
Four images at a time: at least 15 s on v6e-8, 34 s on v5litepod-8, most of it reading the transformer's weights once a code.
"""

from ml_collections import ConfigDict

from configs.xomni import models


def get_config():
    """What differs from the defaults."""
    return ConfigDict(models.inference(batch=2, decode_batch=2))
