"""GRPO on short signs, as the demo runs it. Command: bash launch/demo.sh."""

from ml_collections import ConfigDict


def recipe():
    """GRPO for the tiny model on two CPU cores.

    64 rollouts a step leave a noisy gradient: norm gains and biases may move fast, the gain of the last norm (how sharply codes are drawn)
    a little faster, kernels slowly. Codes drawn sharply too soon leave nothing to compare.
    """
    return dict(
        stage="grpo",
        batch_size=8,
        optimizer=dict(
            learning_rate=1.5e-4, schedule="linear", final_fraction=0.2, rates=(("mm_norm/scale", 150.0), (".*/(scale|bias)", 60.0))
        ),
        grpo=dict(rollouts_per_prompt=8, kl_coef=0.02),
        # Where all rollouts of a prompt read right, 1e-4 of colour is left between them: noise, not a signal.
        advantage=dict(eps=0.03),
        decode=dict(steps=2),  # reads slightly worse than the model's own 4 and takes half the time
        data=dict(pseudo_words=0.5),  # real words alone would be learned by heart
    )


def get_config():
    """What differs from the defaults."""
    run = dict(run_dir="runs/demo/grpo", init_from="xomni_jax/assets/tiny_sft", steps=225, rollout=dict(prompt_length=24))
    return ConfigDict(recipe() | run)
