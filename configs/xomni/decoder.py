"""The diffusion decoder: FLUX.1-dev fine-tuned on codes of real images, text encoders and VAE frozen. Slice: v6e-64 or v5p-64.

Command, on every host: xomni train --config=configs/xomni/decoder.py
Before: xomni plan --config=configs/xomni/decoder.py --topology=v6e-64
Start from a model directory that holds FLUX.1-dev's parts beside the tokenizer.
Expect images in RUN/images that follow the codes by step 2,000.
"""

from ml_collections import ConfigDict

from configs.xomni import models, paths


def get_config():
    """What differs from the defaults."""
    return ConfigDict(
        dict(
            models.released("siglip_vq", "mmdit", "t5", "clip", "autoencoder", mmdit=dict(param_dtype="float32")),
            stage="decoder",
            run_dir="runs/xomni/decoder",
            init_from="runs/xomni/tokenizer/model",
            steps=20000,
            save_every=500,
            mesh=dict(tensor=4),
            optimizer=dict(learning_rate=1e-5, warmup_steps=500),
            freeze=("t5/.*", "clip/.*"),
            decode=dict(steps=28, text_length=512, pooled_length=77),
            data=paths.records(paths.IMAGES_WITH_CAPTIONS, (1152, 1152)),
        )
    )
