"""The released sizes of every component, and how pods compute them."""

from configs import base


def released(c):
    """Sets the model sections that a configuration has."""
    presets = dict(
        transformer="xomni-7b", siglip_vq="siglip2-g-xomni", mmdit="flux-dev-xomni", t5="t5-v1.1-xxl", clip="clip-l", autoencoder="flux",
        reader="qwen2.5-1.5b",
    )  # fmt: skip
    for name, preset in presets.items():
        if name in c:
            c[name] = dict(preset=preset)


def next_token(c, rows, row_length):
    """Packed rows of the transformer's stages; rows split over data x fsdp. Heads run over pieces of 1,024 targets."""
    c.mesh.fsdp, c.mesh.tensor = -1, 4
    c.next_token.rows, c.next_token.row_length, c.next_token.chunk = rows, row_length, 1024
    c.data.sizes, c.data.weights, c.data.text_lengths, c.data.shapes = ((1152, 1152), (768, 1152)), (0.7, 0.3), ((3, 6), (12, 16)), 0.0


def inference():
    """Drawing and answering with the released model; nothing is kept in float32."""
    c = base.inference()
    c.model = "models/xomni"
    released(c)
    c.transformer.param_dtype = "bfloat16"
    c.mesh.fsdp, c.mesh.tensor = -1, 4
    c.decode.steps = 28
    return c
