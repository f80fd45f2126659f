"""The released sizes of every component, and how pods compute them."""

from configs.xomni import paths

PRESETS = dict(
    transformer="xomni-7b",
    siglip_vq="siglip2-g-xomni",
    mmdit="flux-dev-xomni",
    t5="t5-v1.1-xxl",
    clip="clip-l",
    autoencoder="flux",
    reader="qwen2.5-1.5b",
)


def released(*names, **fields):
    """The sections of components at their released sizes; `fields`: {component: fields in which it differs}."""
    return {name: dict(preset=PRESETS[name], **fields.get(name, {})) for name in names}


def next_token(path, **fields):
    """The sections of the transformer's stages: packed rows that split over data x fsdp; heads run over pieces of 1,024 targets."""
    return dict(
        released("transformer"),
        mesh=dict(tensor=4),
        next_token=dict(chunk=1024, **fields),
        data=paths.records(path, (1152, 1152), (768, 1152)),
    )


def inference(**fields):
    """Drawing and answering with the released model; nothing is kept in float32."""
    return dict(
        released("transformer", "siglip_vq", "mmdit", "t5", "clip", "autoencoder", transformer=dict(param_dtype="bfloat16")),
        stage="inference",
        model="models/xomni",
        mesh=dict(tensor=4),
        decode=dict(steps=28),
        **fields,
    )
