"""GRPO on the fine-tuned model. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/grpo.py
Before: xomni plan --config=configs/xomni/grpo.py --topology=v6e-64
Needs the paper's five reward services (xomni_jax/rewards/README.md) at the addresses in paths.py: it does not start without one, and
says what starts it; `xomni rewards check URL` tests one. The text in double quotes of a prompt is what the two readers look for.
Expect grpo/kl below 0.05 and reward/*/mean rising within 50 steps.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths

# The paper publishes no weights: these bring every reward to about 1.
REWARDS = dict(
    hpsv2=dict(weight=1.0, scale=4.0),
    unified_reward=dict(weight=1.0, scale=0.2),
    alignment=dict(weight=1.0),
    # Two readers, of which the one that reads less counts: glyphs that fool one do not pay.
    paddle_ocr=dict(weight=1.0),
    got_ocr=dict(weight=0.0, minimum_with="paddle_ocr"),
)
OTHERS = dict.fromkeys(("ocr", "shapes"), dict(weight=None))  # judge the rendered set


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.released("transformer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder"),
            stage="grpo",
            run_dir="runs/xomni/grpo",
            init_from="runs/xomni/sft/model",
            steps=200,
            save_every=20,
            mesh=dict(tensor=4),
            # 448 prompt tokens with 5,184 codes make eleven blocks of 512 tokens.
            rollout=dict(prompt_length=448, reference_dtype="bfloat16", logit_chunk=1296),
            accumulate=8,
            decode=dict(steps=28, guidance=1.0),
            # Images of 2 to 4 MB: a service begins when the first few have come.
            rewards=OTHERS | {name: dict(urls=paths.REWARDS[name], chunk=4, **how) for name, how in REWARDS.items()},
            data=paths.records(paths.PROMPTS, (1152, 1152), source="prompts"),
        )
    )
