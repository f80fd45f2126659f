"""Defaults of every stage. A run's file starts from one of these functions and changes what differs; unknown keys fail."""

from ml_collections import ConfigDict


def _run(stage, **sections):
    return ConfigDict(
        dict(
            stage=stage,
            run_dir=f"runs/{stage}",
            init_from="",  # model directory with the frozen and the starting parameters
            seed=0,
            steps=1000,
            batch_size=64,  # examples per step over all devices; grpo: prompts per step
            log_every=10,
            save_every=200,
            grid_every=200,
            keep=2,  # resumable checkpoints on disk
            mesh=dict(replica=1, data=1, fsdp=-1, tensor=1),  # -1: the remaining devices
            optimizer=dict(
                learning_rate=1e-3,
                warmup_steps=50,
                schedule="cosine",  # constant | linear | cosine
                final_fraction=0.1,  # of learning_rate, at the last step
                b1=0.9,
                b2=0.95,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            **sections,
        )
    )


def _rendered():
    return dict(
        sizes=((32, 64), (32, 128)),  # pixels, height x width
        size_weights=(0.5, 0.5),
        lengths=((1, 8), (9, 16)),  # characters of a sign, per size
        shapes=0.2,  # share of pictures with shapes instead of a sign
        pseudo_words=0.3,  # share of signs with made-up words
        split="train",
    )
