"""The released sizes of every component, and how pods compute them."""


def released(c):
    """Sets the model sections that a configuration has."""
    presets = dict(
        transformer="xomni-7b", siglip_vq="siglip2-g-xomni", mmdit="flux-dev-xomni", t5="t5-v1.1-xxl", clip="clip-l", autoencoder="flux",
        reader="qwen2.5-1.5b",
    )  # fmt: skip
    for name, preset in presets.items():
        if name in c:
            c[name] = dict(preset=preset)
