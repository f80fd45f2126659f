"""GRPO of LlamaGen's class-conditional model on digits, with instance- and distribution-level rewards: bash launch/loo_fid.sh

It needs its services, with the classifiers that launch/digits.py trains: xomni serve-reward launch/digits.py:DigitScorer --port 8001 and
xomni serve-reward loo_fid --features launch/digits.py:features --port 8002.
"""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults, which are those of the paper's code."""
    return ConfigDict(
        dict(
            stage="loo_fid",
            run_dir="runs/loo_fid/run",
            init_from="runs/llamagen_c2i/model",
            steps=40,
            batch_size=10,
            # 120 rollouts a step leave a noisy gradient: few values may move fast, those of norms and classes.
            optimizer=dict(learning_rate=1e-4, rates=((".*/scale", 60.0), ("lm_embed/.*", 20.0))),
            grpo=dict(kl_coef=0.02),
            entropy=dict(coef=2.2e-3, target=0.5),
            rewards=dict(digit=dict(urls=("http://127.0.0.1:8001",), weight=1.0)),
            data=dict(source="prompts", path="configs/methods/digits.txt", sizes=((28, 28),)),
        )
    )
