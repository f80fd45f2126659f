"""Where the data of the full-size runs lie, and who judges their images: the one place to change.

../README.md says which files can be read and what their columns mean; several files are a tuple or a glob. To try out a run without
any data: --config.data.source=rehearsal draws signs in images of the same size.
"""

IMAGES_WITH_ANSWERS = "data/xomni/answers.jsonl"  # tokenizer: image, question, answer
IMAGES_WITH_CAPTIONS = "data/xomni/captions.jsonl"  # decoder: image, caption
PRETRAINING = "data/xomni/pretraining.jsonl"  # image, caption, question, answer
ANNEALING = "data/xomni/annealing.jsonl"  # the same of the best quality
FINE_TUNING = "data/xomni/fine_tuning.jsonl"  # the same
PROMPTS = "data/xomni/prompts.jsonl"  # reinforcement learning: prompt, and the targets and rewards that judge its images

# Addresses of the reward services, several for replicas. ../../xomni_jax/rewards/README.md has the commands that start them.
REWARDS = {
    "hpsv2": ("http://127.0.0.1:8001",),
    "unified_reward": ("http://127.0.0.1:8002",),
    "alignment": ("http://127.0.0.1:8003",),
    "got_ocr": ("http://127.0.0.1:8004",),
    "paddle_ocr": ("http://127.0.0.1:8005",),
}


def records(path, *sizes, source="files"):
    """The section `data` of a configuration: a file of records, with the (height, width) in pixels that images may have."""
    return dict(source=source, path=path, sizes=sizes)
