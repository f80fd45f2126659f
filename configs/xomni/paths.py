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

# Addresses of the reward services, several for replicas. These are their names in a cluster (../../launch/README.md); on one machine,
# with ../../launch/rewards/compose.yaml, they are http://127.0.0.1 with the ports that it names.
REWARDS = {name: (f"http://{name.replace('_', '-')}:8000",) for name in ("hpsv2", "unified_reward", "alignment", "paddle_ocr", "got_ocr")}


def records(path, *sizes, source="files"):
    """The section `data` of a configuration: a file of records, with the (height, width) in pixels that images may have."""
    return dict(source=source, path=path, sizes=sizes)
