"""Where the data of the full-size runs lie: the one place to change. ../README.md says what a file of records may hold.

To try out a run without any data: --config.data.source=rehearsal draws signs in images of the same size.
"""

IMAGES_WITH_ANSWERS = "data/xomni/answers.jsonl"  # tokenizer: image, question, answer
IMAGES_WITH_CAPTIONS = "data/xomni/captions.jsonl"  # decoder: image, caption
PRETRAINING = "data/xomni/pretraining.jsonl"  # image, caption, question, answer
ANNEALING = "data/xomni/annealing.jsonl"  # the same of the best quality
FINE_TUNING = "data/xomni/fine_tuning.jsonl"  # the same


def records(path, *sizes):
    """The section `data` of a configuration: a file of records, with the (height, width) in pixels that images may have."""
    return dict(source="jsonl", path=path, sizes=sizes)
