"""Fine-tuning on drawing, judging and drawing again, before janus_pro_r1.py: xomni train --config=configs/methods/janus_pro_r1_sft.py"""

from ml_collections import ConfigDict


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            stage="sft",
            run_dir="runs/janus_pro_r1_sft",
            init_from="xomni_jax/assets/tiny_sft",
            steps=300,
            batch_size=32,
            next_token=dict(rows=16, row_length=208, generation=0.8, understanding=0.2, text=0.0),
            optimizer=dict(name="muon", b1=0.95, learning_rate=1e-3, warmup_steps=10, schedule="linear", final_fraction=0.0),
            data=dict(
                source="judged",
                question="is it right?",
                sizes=((32, 64),),
                weights=(1.0,),
                text_lengths=((3, 6),),
                other_faces=0.0,
                centred=1.0,
            ),
        )
    )
